"""Experts on the host against the engine that holds them all: see small_models.py."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.inference import memory
from moe_jax.inference import offload as module
from moe_jax.inference.expert_cache import ExpertCache, ExpertCounts
from moe_jax.inference.offload import OffloadEngine
from moe_jax.inference.session import LoadedModel, Session
from tests.support.command import call
from tests.support.hf_folder import make_folder
from tests.support.slow import slow_unless
from tests.support.small_models import Case, assert_same, case, load, load_offloaded, make_plan

# Who is in which slot


def ids(*experts: int) -> np.ndarray:
    return np.array(experts, np.int32)


def test_the_least_recently_used_leaves_and_none_that_is_needed() -> None:
    cache = ExpertCache(6, 3)
    assert cache.admit(ids(4, 1)) == [(4, 0), (1, 1)]
    assert cache.admit(ids(1, 2)) == [(2, 2)]  # into the slot that nobody had
    assert cache.admit(ids(4)) == []
    assert cache.admit(ids(0, 4)) == [(0, 1)]  # 1 and 2 are as old as each other: the first slot
    assert cache.admit(ids(1, 2, 5)) == [(1, 0), (5, 1)]  # 2 stays though it is the oldest
    assert cache.expert_P.tolist() == [1, 5, 2]
    assert cache.table(ids(2, 5)).tolist() == [
        3,
        3,
        2,
        3,
        3,
        1,
        3,
    ]  # 1 is there and not asked for; the last is padding's


def test_rounds_begin_with_those_that_are_there() -> None:
    cache = ExpertCache(8, 3)
    cache.admit(ids(5, 6, 7))
    rounds = cache.rounds(ids(0, 1, 2, 5, 7))
    assert [group.tolist() for group in rounds] == [[5, 7, 0], [1, 2]]
    assert [cache.admit(group) for group in rounds] == [
        [(0, 1)],
        [(1, 0), (2, 1)],
    ]  # 5, then 0: as old as 7, but in earlier slots
    assert [group.tolist() for group in cache.rounds(ids())] == [[]]


# Results


class Outcome(NamedTuple):
    """Logits [2, 4, V] of two rows, after prompts of different lengths and after three tokens more,
    one by one; and the model.
    """

    logits: np.ndarray
    loaded: LoadedModel
    engine: OffloadEngine
    counts: ExpertCounts


def write(data: Case, loaded: LoadedModel) -> np.ndarray:
    a, b = (list(map(int, text)) for text in data.texts)
    session = Session(loaded, batch=2)
    found = [session.logits([a[:5], b[:3]])]
    return np.stack(
        found
        + [session.logits([a[5 + step : 6 + step], b[3 + step : 4 + step]]) for step in range(3)],
        axis=1,
    )


@functools.cache
def outcome(name: str, size: int, kind: str) -> Outcome:
    loaded = load_offloaded(case(name), size, quantization=kind)
    assert isinstance(loaded.engine, OffloadEngine)
    logits = write(case(name), loaded)
    return Outcome(logits, loaded, loaded.engine, loaded.engine.expert_counts)


@functools.cache
def whole(name: str, kind: str) -> tuple[np.ndarray, LoadedModel]:
    loaded = load(case(name), {}, quantization=kind)
    return write(case(name), loaded), loaded


# Of two rows with two choices each: a step with 2 or 3 slots may need two rounds, a prompt does.
RUNS = [
    ("experts", 2, "float"),  # a dense layer, shared experts behind a gate
    ("experts", 4, "float"),
    ("experts", 9, "float"),  # more than there are
    ("latent", 2, "int8"),  # as DeepSeek-V3
]


@pytest.mark.parametrize(("name", "size", "kind"), slow_unless(RUNS[0].__eq__, RUNS))
def test_logits_are_those_of_the_engine_that_holds_all(name: str, size: int, kind: str) -> None:
    assert_same(outcome(name, size, kind).logits, whole(name, kind)[0])


@pytest.mark.slow
def test_in_bf16_too() -> None:
    """Whose bits the experts' slots hold."""
    data = case("experts")
    offloaded = load_offloaded(data, 4, dtype="bfloat16")
    logits = write(data, load(data, {}, dtype="bfloat16"))
    found = write(data, offloaded)
    np.testing.assert_allclose(found, logits, atol=0.01 * np.abs(logits).max())


def test_the_size_changes_no_bit() -> None:
    """Whether in one round or in several, each choice's row is computed alike and summed in one
    order.
    """
    for size in (4, 9):
        np.testing.assert_array_equal(
            outcome("experts", 2, "float").logits, outcome("experts", size, "float").logits
        )


@contextlib.contextmanager
def compilations() -> Iterator[list[float]]:
    """How long XLA took for each program that it compiles here."""
    seconds: list[float] = []

    def note(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.parametrize(("name", "size", "kind"), slow_unless(RUNS[0].__eq__, RUNS))
def test_what_is_asked_for_is_a_hit_or_a_miss(name: str, size: int, kind: str) -> None:
    engine = (found := outcome(name, size, kind)).engine
    counts = found.counts
    assert counts.tokens == 5 + 3 + 6 and engine.decode_counts.tokens == 6
    # An expert's bytes by the plan that `inspect` and `check_weight_memory` use.
    one = engine.plan.expert_bytes() // (len(counts.hits_L) * engine.plan.moe.num_experts)
    np.testing.assert_array_equal(counts.bytes_L, counts.misses_L * one)
    # Once more: nothing is compiled, and as many experts are asked for; those that all fit are
    # there.
    with compilations() as compiled:
        write(case(name), found.loaded)
    again = engine.expert_counts
    assert compiled == []
    np.testing.assert_array_equal(
        again.hits_L + again.misses_L, 2 * (counts.hits_L + counts.misses_L)
    )
    if size >= engine.plan.moe.num_experts:
        np.testing.assert_array_equal(again.misses_L, counts.misses_L)
        assert counts.misses_L.max() <= engine.plan.moe.num_experts == engine.size


def test_the_same_experts_are_asked_for_whatever_the_size() -> None:
    asked = [outcome("experts", size, "float").counts for size in (2, 4, 9)]
    for counts in asked[1:]:
        np.testing.assert_array_equal(
            counts.hits_L + counts.misses_L, asked[0].hits_L + asked[0].misses_L
        )


def test_the_score() -> None:
    data, (_, normal) = case("experts"), whole("experts", "float")
    loaded = outcome("experts", 4, "float").loaded
    targets, mask = np.roll(data.texts, -1, axis=1), np.ones_like(data.texts, np.float32)
    found, wanted = (some.engine.score(data.texts, targets, mask) for some in (loaded, normal))
    assert found[1] == wanted[1] == mask.sum()
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)


@pytest.mark.slow
def test_memory_that_the_device_reads_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU has it too, where it only costs a copy. A model as gpt-oss, with biases and sinks."""
    monkeypatch.setattr(module, "host_memory", lambda device: "pinned_host")
    loaded = load_offloaded(case("biases"), 3)
    assert isinstance(loaded.engine, OffloadEngine)
    weights = jax.tree.leaves(loaded.engine.weights.experts)
    assert {array.sharding.memory_kind for array in weights} == {"pinned_host"}
    assert_same(write(case("biases"), loaded), whole("biases", "float")[0])


# Refusals, and the command line


def test_sizes_that_cannot_be() -> None:
    module.check_size(make_plan(case("experts"), {}), 2)
    for name, mesh, size, words in (
        (
            "experts",
            {},
            1,
            "--expert-cache-size 1 is less than the 2 experts that each token uses: give at "
            "least 2",
        ),
        ("experts", {"expert": 2}, 4, "--expert-cache-size 4 is for one device and --mesh has 2"),
        ("dense", {}, 4, "--expert-cache-size 4 is for models with experts and this one has none"),
    ):
        with pytest.raises(UserError, match=words):
            module.check_size(make_plan(case(name), mesh), size)


def test_only_what_the_device_holds_need_fit_there() -> None:
    plan = make_plan(case("experts"), {})
    (needed,) = memory.device_bytes(plan, 2).values()
    (everything,) = memory.device_bytes(plan).values()
    assert everything - needed == plan.expert_bytes() * 4 // 6
    memory.check_weight_memory(plan, needed, expert_cache=2)
    with pytest.raises(UserError, match="The weights take"):
        memory.check_weight_memory(plan, needed)


@pytest.mark.slow
def test_as_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command that runs a model, from a Hugging Face folder and from the converted one."""
    folder = make_folder("qwen3_moe-plain", tmp_path / "in")
    generate = ("generate", "--prompt", "The sea", "--greedy", "--max-tokens", "4")
    assert call(*generate, folder) == 0
    text, said = capsys.readouterr()
    assert "experts:" not in said
    assert call(*generate, folder, "--expert-cache-size", "2") == 0
    found, said = capsys.readouterr()
    assert found == text
    assert re.search(r"experts: \d+\.\d% found on the device, [\d.]+ KiB fetched per token", said)
    assert call("convert", folder, tmp_path / "out", "--quantize", "int8") == 0
    (tmp_path / "text").write_text("The sea, the sea.")
    assert (
        call(
            "eval",
            tmp_path / "out",
            "--text",
            tmp_path / "text",
            "--expert-cache-size",
            "3",
        )
        == 0
    )
    assert "found on the device" in capsys.readouterr().err
    bench = (
        "bench",
        tmp_path / "out",
        "-p",
        "3",
        "-g",
        "2",
        "--repeats",
        "1",
        "--expert-cache-size",
        "3",
    )
    assert call(*bench, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["expert_cache_size"] == 3 and figures["expert_memory"] == "numpy"
    assert (
        sum(figures["expert_hits_by_layer"]) == figures["expert_hits"]
        and sum(figures["expert_misses_by_layer"]) == figures["expert_misses"]
    )
    assert figures["expert_bytes"] > 0 and 0 < figures["decode_hit_rate"] <= 1
    assert call(*generate, folder, "--expert-cache-size", "1") == 2
    assert capsys.readouterr().err.startswith(
        "moe-jax: --expert-cache-size 1 is less than the 2 experts that each token uses"
    )
    assert call("inspect", folder, "--expert-cache-size", "2", "--json") == 0
    small = json.loads(capsys.readouterr().out)
    assert call("inspect", folder, "--json") == 0
    large = json.loads(capsys.readouterr().out)
    experts = large["held_bytes"]["experts"]
    assert small["held_bytes"] == large["held_bytes"] | {"experts": experts * 2 // 8}
    assert (
        any(
            note.startswith("The device keeps 2 of the 8 experts of a layer")
            for note in small["notes"]
        )
        and small["whole_bytes"] == large["whole_bytes"]
    )
