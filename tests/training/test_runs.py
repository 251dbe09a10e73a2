"""Whole runs: killed, stopped, resumed, moved to another mesh, broken by numbers, and what their
files say.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

from moe_jax.checkpoint.manager import Checkpoints
from moe_jax.config.load import load_config
from moe_jax.errors import UserError
from moe_jax.models.layer_pattern import expert_layers
from moe_jax.models.paths import path_of
from moe_jax.parallel.mesh import make_mesh
from moe_jax.placement.balanced import balanced
from moe_jax.placement.table import Placement, contiguous, count_slots
from moe_jax.profiling import flops as measure
from moe_jax.tracking import run_dir
from moe_jax.tracking.metrics import read_metrics
from moe_jax.training import restore
from moe_jax.training import trainer as training
from moe_jax.training.step import TrainProgram
from tests.support import ROOT
from tests.support.command import run_module
from tests.support.endings import KILLED, SAVED, STOPPED
from tests.support.small_disk import mounted
from tests.support.tiny_run import (
    STATEFUL,
    config_file,
    copy_until,
    finished,
    lines,
    run,
    shared_program,
    step_directory,
    tiny,
    training_lines,
    without_times,
)

BIAS = "moe.bias_rate=0.01"


# Killed, stopped and resumed. One process imports the program and forks a child for each way to
# end.


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """The run that none of the others may differ from."""
    return finished(folder, *STATEFUL)


@pytest.fixture(scope="module")
def ended(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """Run directories that killed and stopped processes left, and the processes' exit codes."""
    root = tmp_path_factory.mktemp("ended")
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    endings = (*KILLED, *STOPPED, *SAVED, "--", *STATEFUL)
    done = run_module(
        "endings", root, config_file(folder), *endings, environment=cache, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return root, json.loads(done.stdout)


@pytest.mark.parametrize("end", KILLED)
@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(
    end: str, ended: tuple[Path, dict[str, int]], whole: Path, folder: Path
) -> None:
    root, codes = ended
    assert codes[end] == -signal.SIGKILL
    saved = Checkpoints(root / end / "checkpoints", 9, 1).steps()
    assert saved == {"validated": [3], "saving": [3], "saved": [3, 6]}.get(end, [])
    run(folder, root / end, *STATEFUL, resume=True)
    assert lines(root / end) == lines(whole)
    assert same_states(root / end, whole, 8)
    resumed = [
        record["step"]
        for record in read_metrics(root / end / "metrics.jsonl")
        if record.get("event") == "resumed"
    ]
    assert resumed == saved[-1:]


@pytest.mark.parametrize(("end", "step"), [("SIGTERM", 5), ("SIGINT", 3)])
@pytest.mark.slow
def test_a_signal_ends_the_run_with_a_checkpoint(
    end: str, step: int, ended: tuple[Path, dict[str, int]], whole: Path, folder: Path
) -> None:
    root, codes = ended
    assert codes[end] == 0
    assert (
        f"Stopped after step {step}; saved. Continue with the same command and --resume."
        in (root / f"{end}.out").read_text()
    )
    assert "Traceback" not in (root / f"{end}.err").read_text()
    assert Checkpoints(root / end / "checkpoints", 9, 1).latest() == step
    assert lines(root / end)[-1] == {"step": step, "event": "checkpoint"}
    run(folder, root / end, *STATEFUL, resume=True)
    extra = {"step": step, "event": "checkpoint"}
    regular = lines(whole)
    assert [record for record in lines(root / end) if record != extra] == [
        record for record in regular if record != extra
    ]
    assert same_states(root / end, whole, 8)


@pytest.mark.parametrize("end", SAVED)
@pytest.mark.slow
def test_a_warning_or_a_closed_terminal_saves_and_the_run_goes_on(
    end: str, ended: tuple[Path, dict[str, int]], whole: Path
) -> None:
    root, codes = ended
    assert codes[end] == 0
    extra = {"step": 5, "event": "checkpoint"}
    regular = lines(whole)
    assert extra in lines(root / end) and extra not in regular
    assert without_checkpoints(lines(root / end)) == without_checkpoints(regular)
    assert Checkpoints(root / end / "checkpoints", 9, 1).steps() == [3, 5, 6, 8]
    assert same_states(root / end, whole, 8)
    said = (root / f"{end}.out").read_text()
    if end == "SIGHUP":  # its output is a pipe that nobody reads
        notice = "Nobody reads standard output; the run goes on: moe-jax watch "
        assert said == "" and (root / f"{end}.err").read_text().startswith(notice)
    else:
        assert "step 5: SIGUSR1 came: saving, and going on." in said


def without_checkpoints(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if record.get("event") != "checkpoint"]


@pytest.mark.parametrize("end", ["SIGTERM at once", "SIGINT at once", "SIGTERM twice"])
@pytest.mark.slow
def test_a_signal_that_leaves_nothing_saved_gives_its_exit_code(
    end: str, ended: tuple[Path, dict[str, int]]
) -> None:
    root, codes = ended
    assert codes[end] == STOPPED[end]
    assert "Traceback" not in (root / f"{end}.err").read_text()
    assert (root / end).exists() == (end == "SIGTERM twice")


def same_states(left: Path, right: Path, step: int) -> bool:
    """Whether the arrays and the data position of two checkpoints are the same, by their
    checksums.
    """
    arrays = [
        json.loads((step_directory(path, step) / "manifest.json").read_text())["arrays"]
        for path in (left, right)
    ]
    positions = [
        Checkpoints(path / "checkpoints", 9, 1).read_meta(step)["data"] for path in (left, right)
    ]
    return arrays[0] == arrays[1] and positions[0] == positions[1]


def test_the_same_seed_on_the_same_mesh_gives_the_same_run(
    whole: Path, folder: Path, tmp_path: Path
) -> None:
    again = run(folder, tmp_path / "again", *STATEFUL, fresh=True)
    assert lines(again) == lines(whole)
    assert same_states(again, whole, 8)


def test_resuming_a_finished_run_of_which_there_is_nothing_to_draw(
    whole: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that was resized has no training line yet; one whose checkpoints alone were copied has no
    metrics.jsonl.
    """
    copy = copy_until(whole, tmp_path / "copy", 8)
    (copy / "report.html").unlink(missing_ok=True)
    for write in (lambda path: path.write_text('{"step": 8, "event": "resized"}\n'), Path.unlink):
        write(copy / "metrics.jsonl")
        run(folder, copy, *STATEFUL, resume=True, command=True)
        out = capsys.readouterr().out
        assert "all 8 steps are done. To go on, give more" in out and "Report" not in out
    assert not (copy / "report.html").exists()


def test_resuming_a_finished_run_adds_nothing(
    whole: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copy_until(whole, tmp_path / "copy", 8)
    run(folder, copy, *STATEFUL, "train.sample_prompt=x", resume=True, command=True)
    assert lines(copy) == lines(whole)
    out = capsys.readouterr().out
    assert f"{copy}: all 8 steps are done. To go on, give more: --set train.steps=16.\n" in out
    assert out.count("\n") == 2 and "Report:" in out  # nothing was read, compiled or sampled


def test_a_finished_run_goes_on_with_more_steps_and_not_with_fewer(
    whole: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copy_until(whole, tmp_path / "copy", 8)
    with pytest.raises(UserError, match=r"train.steps=4 but the run in .* has done 8"):
        run(folder, copy, *STATEFUL, "train.steps=4", resume=True)
    assert lines(copy) == lines(whole)
    run(folder, copy, *STATEFUL, "train.steps=9", resume=True)
    assert lines(copy)[: len(lines(whole))] == lines(whole)
    (event,) = [line for line in lines(copy) if line.get("event") == "learning_rate"]
    assert event["step"] == 8 and event["changed"] == {"train.steps": [8, 9]}
    rates = {record["step"]: record["lr"] for record in training_lines(copy)}
    assert rates[9] == pytest.approx(event["after"]) and rates[9] > event["before"]
    assert "The learning rate goes on at" in capsys.readouterr().out


def test_the_same_text_under_another_path_is_the_same_run(
    whole: Path, folder: Path, tmp_path: Path
) -> None:
    copy, text = copy_until(whole, tmp_path / "copy", 6), tmp_path / "elsewhere.txt"
    text.write_bytes((folder / "text.txt").read_bytes())
    run(folder, copy, *STATEFUL, f"data.source={text}", resume=True)
    assert lines(copy) == lines(whole) and same_states(copy, whole, 8)


def test_resume_without_a_run_starts_one_and_says_so(
    whole: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = run(folder, tmp_path / "new", *STATEFUL, resume=True)
    assert lines(new) == lines(whole)
    assert f"--resume: there is no checkpoint in {new} yet: beginning" in capsys.readouterr().out


def test_overwrite_replaces_the_run_and_nothing_else(
    folder: Path, tmp_path: Path, whole: Path
) -> None:
    copy = copy_until(whole, tmp_path / "copy", 8)
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"--overwrite would delete .*notes\.txt"):
        run(folder, copy, *STATEFUL, overwrite=True)
    assert lines(copy) == lines(whole) and (copy / "notes.txt").read_text() == "mine"
    (copy / "notes.txt").unlink()
    run(folder, copy, *STATEFUL, "train.seed=1", "checkpoint.every=8", overwrite=True)
    assert training_lines(copy)[0]["ce_loss"] != training_lines(whole)[0]["ce_loss"]
    assert Checkpoints(copy / "checkpoints", 9, 1).steps() == [8]


def test_lines_between_log_steps_are_left_out_and_the_others_are_the_same(
    whole: Path, folder: Path, tmp_path: Path
) -> None:
    sparse = run(
        folder,
        tmp_path / "sparse",
        *STATEFUL,
        "train.log_every=4",
        "train.eval_every=8",
        "checkpoint.every=8",
    )
    assert [record["step"] for record in training_lines(sparse)] == [4, 8]
    every = {record["step"]: record for record in without_times(training_lines(whole))}
    assert without_times(training_lines(sparse)) == [every[4], every[8]]


# Moved to another mesh.


def logical(state: object, program: TrainProgram) -> dict[str, np.ndarray]:
    """A state's arrays by path, experts in logical order; tables, which differ by design, left out
    but for the bias.
    """
    layers = expert_layers(program.model, program.moe)
    first_LE = program.placement.logical_to_physical()[:, :, 0]
    found = {}
    for keys, leaf in jax.tree.leaves_with_path(state):
        path, array = path_of(keys), np.asarray(leaf)
        if path.is_expert and array.ndim > 1:  # adafactor has placeholders besides
            rows = np.array(layers[path.layer_block])
            array = np.stack([array[i][first_LE[row]] for i, row in enumerate(rows)])
        name = path.text
        if name != "expert_LP" and (not name.startswith("tables/") or name.endswith("bias_E")):
            found[name] = array
    return found


def make_program(folder: Path, *overrides: str, placement: Placement | None = None) -> TrainProgram:
    config = tiny(folder, *overrides)
    mesh = make_mesh(config.mesh)
    placement = placement or contiguous(
        2, config.moe.num_experts, config.mesh.expert, config.placement.redundant_slots
    )
    return TrainProgram(
        config.model, config.moe, config.optimizer, mesh, placement, vocab_size=264, steps=6
    )


def _alike(program: TrainProgram, keys: Any, leaf: np.ndarray) -> np.ndarray:
    """Replicas of an expert made the same."""
    path = path_of(keys)
    if not path.is_expert or leaf.ndim < 2:
        return leaf
    rows = expert_layers(program.model, program.moe)[path.layer_block]
    table, first = program.placement.physical_to_logical[rows], program.placement.first_slot()[rows]
    return np.stack(
        [values[np.where(t < 0, 0, f[t])] for values, t, f in zip(leaf, table, first, strict=True)]
    )


def mesh_settings(data: int, expert: int) -> tuple[str, str, str]:
    return f"mesh.data={data}", f"mesh.expert={expert}", f"devices.simulate={data * expert}"


@pytest.mark.parametrize(
    ("optimizer", "experts", "redundant"),
    [
        pytest.param("adamw", 4, 0, marks=pytest.mark.slow),  # less than the next one
        ("adamw", 6, 2),
        pytest.param("adafactor", 6, 1, marks=pytest.mark.slow),
        ("muon", 6, 0),
    ],
)
def test_a_checkpoint_restores_on_every_mesh_with_its_moments(
    optimizer: str, experts: int, redundant: int, folder: Path, tmp_path: Path
) -> None:
    """From a planned table too, with and without replicas; the same slots by another table are
    other experts.
    """
    settings = (f"moe.num_experts={experts}", f"optimizer.name={optimizer}")
    if optimizer == "adafactor":
        settings += ("model.width=128", "moe.hidden=128")  # smaller matrices it does not factor
    draw = np.random.default_rng(0)
    table = balanced(
        draw.lognormal(0, 1, (2, experts)), 4, count_slots(experts, 4, redundant) // 4, 1, 1, None
    )
    old = make_program(
        folder,
        *settings,
        *mesh_settings(2, 4),
        placement=Placement(table.reshape(2, -1), experts, 4),
    )
    state = old.init(0)
    # Every float is drawn anew, so that moments are not all zero; empty slots hold what they may.
    drawn = jax.tree.map(
        lambda a: (
            draw.standard_normal(a.shape, np.float32) if a.dtype == np.float32 else np.asarray(a)
        ),
        state,
    )
    state = jax.device_put(jax.tree.map_with_path(partial(_alike, old), drawn), old.state_shardings)
    checkpoints = Checkpoints(tmp_path, 1, 0)
    checkpoints.save(3, state, {"placement": old.placement.to_json()}, wait=True)
    expected = logical(state, old)
    for data, expert, more in ((1, 1, 0), (8, 1, 0), (1, 8, 0), (2, 4, 0), (2, 4, redundant)):
        new = make_program(
            folder, *settings, *mesh_settings(data, expert), f"placement.redundant_slots={more}"
        )
        restored = restore.restore_state(checkpoints, new, step=None, fallback=False).state
        found = logical(restored, new)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values, err_msg=f"{name} on {data}x{expert}")
        np.testing.assert_array_equal(restored.expert_LP, new.placement.physical_to_logical)
        for have, want in zip(restored.tables[:3], new.placement.routing(), strict=True):
            np.testing.assert_array_equal(have, want)
        for leaf, sharding in zip(
            jax.tree.leaves(restored), jax.tree.leaves(new.state_shardings), strict=True
        ):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


@pytest.mark.parametrize(
    ("data", "expert", "redundant"),
    [(1, 1, 0), (8, 1, 0), (1, 8, 0), (2, 4, 1)],
)
@pytest.mark.slow
def test_training_goes_on_on_another_mesh(
    data: int, expert: int, redundant: int, folder: Path, tmp_path: Path
) -> None:
    settings = ("moe.dropless=true", BIAS)
    base = finished(folder, *settings)
    moved = copy_until(base, tmp_path / "moved", 3)
    run(
        folder,
        moved,
        *settings,
        *mesh_settings(data, expert),
        f"placement.redundant_slots={redundant}",
        resume=True,
    )
    for found, expected in zip(training_lines(moved), training_lines(base), strict=True):
        for name in ("loss", "ce_loss", "aux_loss", "z_loss", "grad_norm"):
            np.testing.assert_allclose(
                found[name], expected[name], rtol=1e-5, err_msg=f"{name} of step {found['step']}"
            )
        assert (found["kept"], found["dropped"]) == (expected["kept"], 0)
        assert [layer["load"] for layer in found["layers"]] == [
            layer["load"] for layer in expected["layers"]
        ]
    # The moved run's checkpoint, with its other number of slots, goes back to where it came from.
    assert Checkpoints(moved / "checkpoints", 9, 1).latest() == 6
    back = copy_until(moved, tmp_path / "back", 6)
    run(folder, back, *settings, resume=True)
    environment = json.loads((moved / "environment.json").read_text())
    assert environment["mesh"] == {"data": data, "expert": expert, "tensor": 1}
    assert environment["empty_slots_per_layer"] == (4 if expert == 8 else 0)


@pytest.mark.slow
def test_a_fallback_over_a_change_of_placement_follows_the_table_of_what_it_finds(
    folder: Path, tmp_path: Path
) -> None:
    """Both tables have 8 slots, so the arrays fit; with the wrong table they would be other
    experts' weights.
    """
    checkpoints, programs = Checkpoints(tmp_path, 2, 0), []
    for step, (expert, redundant) in ((1, (4, 1)), (2, (2, 2))):
        program = make_program(
            folder, *mesh_settings(1, expert), f"placement.redundant_slots={redundant}"
        )
        checkpoints.save(
            step, program.init(0), {"placement": program.placement.to_json()}, wait=True
        )
        programs.append(program)
    damage(tmp_path / "step_00000002" / "state")
    found = restore.restore_state(checkpoints, programs[1], step=None, fallback=True)
    assert found.step == 1 and len(found.skipped) == 1
    expected, got = logical(programs[0].init(0), programs[0]), logical(found.state, programs[1])
    for name, values in expected.items():
        np.testing.assert_array_equal(got[name], values, err_msg=name)


def damage(directory: Path) -> None:
    """Flips a bit in the largest file."""
    path = max(
        (path for path in directory.rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# What the files say.


def documented(heading: str) -> set[str]:
    """The names in the first column of the table below a heading of docs/metrics.md."""
    text = (ROOT / "docs" / "metrics.md").read_text().split(heading, 1)[1].split("|---|", 1)[1]
    rows = re.match(r"[^\n]*\n((?:\|[^\n]*\n)+)", text)
    assert rows
    return {
        name for row in rows[1].splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }


PROMISED = {
    "step",
    "loss",
    "ce_loss",
    "aux_loss",
    "z_loss",
    "grad_norm",
    "lr",
    "tokens",
    "tokens_per_second",
    "step_seconds",
    "mfu",
}


def test_every_field_is_documented_and_every_documented_field_is_there(whole: Path) -> None:
    for record in training_lines(whole):
        assert record.keys() == {"step"} | documented("### Training lines")
        assert record.keys() >= PROMISED | {"kept", "dropped", "layers"}
        for layer in record["layers"]:
            assert layer.keys() == documented("Each object of `layers`")
    validations = [
        record for record in read_metrics(whole / "metrics.jsonl") if "val_loss" in record
    ]
    assert [record["step"] for record in validations] == [5, 8]
    assert all(
        record.keys() == {"step"} | documented("### Validation lines") for record in validations
    )
    assert json.loads((whole / "environment.json").read_text()).keys() == documented(
        "## environment.json"
    )


def test_the_figures_agree_with_each_other(whole: Path, folder: Path) -> None:
    config = tiny(folder, *STATEFUL)
    tokens = config.train.global_batch * config.train.seq_len
    environment = json.loads((whole / "environment.json").read_text())
    flops = 3 * measure.model_flops(config.model, config.moe, 264, config.train.seq_len)
    for record in training_lines(whole):
        assert record["kept"] + record["dropped"] == config.moe.top_k * tokens * 2
        assert record["dropped"] > 0 and record["dropped_fraction"] == record["dropped"] / (
            config.moe.top_k * tokens * 2
        )
        assert record["tokens"] == record["step"] * tokens
        assert record["tokens_per_second"] * record["step_seconds"] == pytest.approx(tokens)
        assert record["mfu"] == pytest.approx(
            record["tokens_per_second"] * flops / environment["matmul_flops_per_second"]
        )
        assert record["loss"] == pytest.approx(
            record["ce_loss"] + record["aux_loss"] + record["z_loss"]
        )
        assert sum(layer["dropped"] for layer in record["layers"]) == record["dropped"]
        for layer in record["layers"]:
            load = np.array(layer["load"])
            assert load.shape == (4,) and load.sum() == config.moe.top_k * tokens
            assert layer["max_violation"] == pytest.approx(load.max() / load.mean() - 1)
            assert layer["dead_experts"] == np.sum(load == 0)
            assert 0 < layer["router_entropy"] <= np.log(4) * (1 + 1e-6)


def test_a_step_that_takes_longer_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of unlogged steps is counted, the time of validations and checkpoints is not."""
    clock = [0.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])
    fetch = jax.device_get

    def slow(values: object) -> object:
        clock[0] += 1.0
        return fetch(values)

    monkeypatch.setattr(training.jax, "device_get", slow)
    directory = run(folder, tmp_path / "slow", BIAS, "train.log_every=3")
    assert [record["step"] for record in training_lines(directory)] == [3, 5, 6]
    assert [record["step_seconds"] for record in training_lines(directory)] == [1.0, 1.0, 1.0]


def test_the_environment_says_what_each_device_holds(whole: Path, folder: Path) -> None:
    environment = json.loads((whole / "environment.json").read_text())
    held = environment["bytes_per_device"]
    experts = 2 * 4 * 3 * 32 * 16 * 4  # layers x experts x matrices x width x hidden, f32
    assert list(held) == [str(device) for device in range(8)]
    for kinds in held.values():
        assert kinds["expert_parameters"] == experts / (
            4 * 2
        )  # over the expert axis, and FSDP over data
        assert kinds["expert_optimizer"] == 2 * kinds["expert_parameters"]
        assert kinds["dense_parameters"] < (environment["parameters"]["total"] * 4 - experts) / 4
    assert environment["parameters"]["total"] == sum(
        leaf.size for leaf in jax.tree.leaves(make_program(folder, *STATEFUL).abstract_state.params)
    )
    assert environment["versions"]["jax"] == jax.__version__
    assert len(environment["devices"]) == 8 and environment["platform"] == "cpu"
    assert re.fullmatch(r"[0-9a-f]{64}", environment["corpus_hash"])


def test_the_run_directory_is_complete(whole: Path, folder: Path) -> None:
    assert {path.name for path in whole.iterdir()} == set(run_dir.CONTENTS) - {
        *("tokenizer", "hf_config.json"),  # which runs with init_from keep
        "attempts.jsonl",  # of attempts that a later one followed
        "logs",  # which only `moe-jax launch` writes
        "forecasts.npz",  # of runs that train a forecaster
    }
    resolved = tiny(folder, *STATEFUL, "moe.dropless=false")  # null: nothing to begin from
    assert load_config(whole / "config.yaml") == resolved
    assert yaml.safe_load((whole / "config.yaml").read_text())["train"]["steps"] == 8
    assert len(list((whole / "plots").glob("*.png"))) >= 5
    assert "data:image/png;base64," in (whole / "report.html").read_text()
    assert list((whole / "tensorboard").iterdir())


def test_a_sample_and_the_report_end_a_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = run(
        folder,
        tmp_path / "sampled",
        BIAS,
        "train.sample_prompt=router",
        "train.sample_tokens=5",
        command=True,
    )
    out = capsys.readouterr().out
    assert "step 6/6  loss " in out and "validation loss" in out and "\nrouter" in out
    assert out.rstrip().endswith(f"Report: {directory / 'report.html'}")


# Numbers that break.


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch):
    """Makes the loss NaN at some steps, by the mask of their batches."""

    def planted(steps: set[int]) -> None:
        def make(*args: object, **options: object) -> TrainProgram:
            program = shared_program(*args, **options)
            real, calls = TrainProgram.shard, [-1]  # the first call is of the validation batch

            def shard(batch: dict[str, np.ndarray], first: int = 0) -> object:
                calls[0] += 1
                return real(
                    program,
                    {**batch, "mask": batch["mask"] * np.nan} if calls[0] in steps else batch,
                    first,
                )

            monkeypatch.setattr(program, "shard", shard)
            return program

        monkeypatch.setattr("tests.support.tiny_run.shared_program", make)

    return planted


def params(directory: Path, step: int) -> dict[str, str]:
    arrays = json.loads((step_directory(directory, step) / "manifest.json").read_text())["arrays"]
    return {
        name: array["checksum"]
        for name, array in arrays.items()
        if name.startswith(("params", "opt_state", "tables"))
    }


def test_a_step_that_is_not_finite_is_skipped_and_counted(
    folder: Path, tmp_path: Path, plant
) -> None:
    plant({2, 4, 5})
    directory = run(folder, tmp_path / "skips", "checkpoint.every=1", "train.max_skipped=3", BIAS)
    records = training_lines(directory)
    assert [record["skipped"] for record in records] == [0, 1, 1, 2, 3, 3]
    assert [record["step"] for record in records if record["loss"] is None] == [2, 4, 5]
    assert records[1]["nonfinite"]["loss"] == "nan"
    events = [
        record
        for record in read_metrics(directory / "metrics.jsonl")
        if record.get("event") == "skipped_step"
    ]
    assert events == [{"step": step, "event": "skipped_step", "count": 1} for step in (2, 4, 5)]
    assert params(directory, 2) == params(directory, 1)
    assert params(directory, 5) == params(directory, 3) != params(directory, 2)
    assert params(directory, 6) != params(directory, 5)


def test_too_many_in_a_row_stop_the_run_with_the_state_before_them(
    folder: Path, tmp_path: Path, plant
) -> None:
    plant({3, 4, 5, 6})
    with pytest.raises(
        UserError,
        match=r"not finite in 2 steps in a row \(train.max_skipped\), up to step 4: "
        r".*optimizer.learning_rate",
    ):
        run(folder, tmp_path / "broken", "checkpoint.every=2", "train.max_skipped=2", BIAS)
    directory = tmp_path / "broken"
    assert Checkpoints(directory / "checkpoints", 9, 1).steps() == [2, 4]
    assert params(directory, 4) == params(directory, 2)
    assert [record["step"] for record in training_lines(directory)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_learning_rate_that_is_far_too_high_stops_the_run(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lower optimizer\.learning_rate"):
        run(folder, tmp_path / "wild", "optimizer.learning_rate=1e38", "train.max_skipped=2")
    found = restored_params(folder, tmp_path / "wild")
    assert all(np.isfinite(leaf).all() for leaf in found.values())


def restored_params(folder: Path, directory: Path) -> dict[str, np.ndarray]:
    program = make_program(folder)
    checkpoints = Checkpoints(directory / "checkpoints", 9, 1)
    found = restore.restore_state(checkpoints, program, step=None, fallback=False)
    return logical(found.state.params, program)


# The disk.


def test_a_full_disk_stops_the_run_and_keeps_what_it_had(folder: Path, tmp_path: Path) -> None:
    settings = (BIAS, "checkpoint.every=1")
    with mounted(tmp_path / "disk", "1500k") as disk:
        with pytest.raises(UserError, match=r"too full to save step \d+: free some space"):
            run(folder, disk / "run", *settings)
        steps = Checkpoints(disk / "run" / "checkpoints", 9, 1).steps()
        assert steps and steps[-1] < 6
        assert training_lines(disk / "run")[-1]["step"] > steps[-1]
        subprocess.run(["mount", "-o", "remount,size=9m", disk], check=True)
        run(folder, disk / "run", *settings, "checkpoint.every=6", resume=True)
        assert training_lines(disk / "run")[-1]["step"] == 6
