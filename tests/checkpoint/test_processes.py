"""Two processes save and restore together, each its own share of files and experts."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import AxisType

from moe_jax.checkpoint.integrity import MANIFEST, SEAL
from moe_jax.checkpoint.manager import Checkpoints
from tests.support import ROOT
from tests.support.restoring_process import (
    ON_FOUR,
    ON_TWO,
    REPLICAS,
    between,
    put,
    same,
    table,
    target,
    values,
)


def expert_mesh(ranks: int) -> Any:
    return jax.make_mesh(
        (ranks,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:ranks]
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The directory of both, and what each process said."""
    root = tmp_path_factory.mktemp("two_processes")
    alone = Checkpoints(root / "one", 9, 0)
    alone.save(7, put(values(table(ON_TWO, 2), 7), expert_mesh(2)), {}, wait=True)
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        port = str(taken.getsockname()[1])
    command = [sys.executable, "-m", "tests.support.restoring_process"]
    started = [
        subprocess.Popen(
            [*command, str(rank), port, str(root)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == 0, errors
    return root, [json.loads(text.splitlines()[-1]) for text, _ in outputs]


def files_of(step: Path) -> list[str]:
    return sorted(
        str(path)
        for path in step.rglob("*")
        if path.is_file() and path.name not in (MANIFEST, SEAL)
    )


@pytest.mark.slow
def test_each_file_is_hashed_by_one_process(two: tuple[Path, list[dict[str, Any]]]) -> None:
    root, (first, second) = two
    partial = [
        path.replace("step_00000001", "step_00000001.partial")
        for path in files_of(root / "two" / "step_00000001")
    ]
    assert sorted(first["sealed"] + second["sealed"]) == partial
    assert sorted(first["verified"] + second["verified"]) == files_of(
        root / "two" / "step_00000001"
    )
    # What a process wrote, it verifies.
    assert second["verified"] and all("process_1" in path for path in second["verified"])
    of_one = files_of(root / "one" / "step_00000007")
    assert sorted(first["verified_of_one"] + second["verified_of_one"]) == of_one
    assert first["verified_of_one"] and second["verified_of_one"]


def test_damage_is_told_to_all_and_the_step_before_is_taken(
    two: tuple[Path, list[dict[str, Any]]],
) -> None:
    _, (first, second) = two
    assert "step_00000002" in first["told"] and "--fallback takes step 1" in first["told"]
    assert second["told"] == first["told"]
    assert (first["step"], second["step"]) == (1, 1) and first["same"] and second["same"]


def test_a_save_that_fails_on_one_process_fails_on_all(
    two: tuple[Path, list[dict[str, Any]]],
) -> None:
    _, said = two
    for one in said:
        assert one["told_of_save"].startswith("process 1: the disk of ")
        assert one["seconds"] < 60  # Orbax alone waits for ten minutes
    assert said[0]["after_failure"] == [[1, 2], []]


def test_an_error_of_the_work_waits_for_the_save_under_way(
    two: tuple[Path, list[dict[str, Any]]],
) -> None:
    _, said = two
    for one in said:
        assert (one["ended_with"], one["then"]) == ("the loss is not finite", [1, 2, 4])


def test_each_process_reads_the_experts_that_it_will_hold(
    two: tuple[Path, list[dict[str, Any]]],
) -> None:
    """On another placement, with replicas and empty slots; moments too."""
    _, said = two
    for one in said:
        assert one["moved"] and one["of_one"]
        assert 0 < one["share"] <= one["slots"] < 1.02 * one["share"] + 16_000


@pytest.mark.parametrize(("rows", "ranks"), [(ON_FOUR, 4), (ON_TWO, 2), (REPLICAS, 4)])
def test_one_process_restores_what_two_saved(
    two: tuple[Path, list[dict[str, Any]]], rows: list[list[int]], ranks: int
) -> None:
    root, _ = two
    placement = table(rows, ranks)
    expected = values(placement, 1)
    found = Checkpoints(root / "two", 9, 0).restore(
        1, target(expected, expert_mesh(ranks)), between(table(ON_FOUR, 4), placement)
    )
    assert same(found, expected)
