"""Another number of experts: which are copied and removed, what stays bitwise, that training goes
on, and what is refused.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from moe_jax.checkpoint import orbax_io
from moe_jax.cli.main import main
from moe_jax.config.load import config_from_text, dump_config
from moe_jax.config.schema import Config
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.errors import UserError
from moe_jax.inference.load import Session, open_model
from moe_jax.models.layer_pattern import count_moe_layers
from moe_jax.models.parameters import Parameter
from moe_jax.models.paths import ParameterPath
from moe_jax.tracking.metrics import read_metrics
from moe_jax.training.resize.experts import Change, Copies, carry, choose, from_dense
from moe_jax.training.resize.host_state import (
    RunArrays,
    host_program,
    measured_load,
    read_run,
    write_run,
)
from moe_jax.training.resize.resize import Wanted, resize
from tests.support import tiny_run
from tests.support.hf_folder import make_folder
from tests.support.slow import slow_unless

TWO = ("devices.simulate=2", "mesh.data=1", "mesh.expert=2")
ONE = ("devices.simulate=1", "mesh.data=1", "mesh.expert=1")
EIGHT = (
    *TWO,
    "checkpoint.every=2",
    "moe.num_experts=8",
    "moe.dropless=true",
    "moe.bias_rate=0.01",
    "moe.score=sigmoid",
    "placement.strategy=round_robin",
    "placement.redundant_slots=1",
)
DENSE = (*ONE, "moe.first_dense=2", "moe.dropless=true", "train.steps=3")
ZERO, COPY = Copies(0.0, "zero", 0), Copies(0.5, "copy", 0)
PROMPT = list(b"the router of the expert")


# Arrays alone


def test_the_busiest_are_copied_and_the_least_used_removed() -> None:
    load = np.array([[5.0, 1.0, 9.0, 5.0], [0.0, 2.0, 0.0, 1.0]])
    more = choose(load, 6)
    assert more.source_LE.tolist() == [[0, 1, 2, 3, 2, 0], [0, 1, 2, 3, 1, 3]]
    assert more.copied_LE.tolist() == [[False] * 4 + [True] * 2] * 2
    assert choose(load, 9).source_LE[0].tolist() == [0, 1, 2, 3, 2, 0, 3, 1, 2]
    fewer = choose(load, 3)
    assert fewer.source_LE.tolist() == [[0, 2, 3], [0, 1, 3]]
    assert not fewer.copied_LE.any()


def test_groups_keep_their_experts() -> None:
    load = np.array([[1.0, 2.0, 9.0, 8.0]])
    assert choose(load, 6, groups=2).source_LE.tolist() == [[0, 1, 1, 2, 3, 2]]
    assert choose(load, 6, groups=2).copied_LE.tolist() == [[False, False, True] * 2]
    assert choose(load, 2, groups=2).source_LE.tolist() == [[1, 2]]


def test_copies_get_noise_relative_to_the_expert_and_moments_as_asked() -> None:
    draw = np.random.default_rng(0)
    scale = np.array([1.0, 100.0], np.float32)[None, :, None, None]
    block = "stacks/0/blocks/0/mlp"
    old = {
        f"params/{block}/experts/down": scale
        * draw.standard_normal((2, 2, 40, 50)).astype(np.float32),
        f"params/{block}/router/weight": draw.standard_normal((2, 400, 2)).astype(np.float32),
        f"params/{block}/router/bias": draw.standard_normal((2, 2)).astype(np.float32),
        f"opt_state/mu/{block}/experts/down": draw.standard_normal((2, 2, 40, 50)).astype(
            np.float32
        ),
        f"opt_state/row/{block}/router/weight": draw.standard_normal((2, 400)).astype(
            np.float32
        ),  # factored: experts are averaged
        "opt_state/count": np.array(7),
    }
    change = Change(np.array([[0, 1, 1], [0, 1, 0]]), np.array([[False, False, True]] * 2))
    shapes = {
        name: tuple(3 if size == 2 and dim else size for dim, size in enumerate(array.shape))
        for name, array in old.items()
    }
    new = carry(old, shapes, change, {(0, 0): [0, 1]}, COPY)
    assert {name: array.shape for name, array in new.items()} == shapes
    weights = new[f"params/{block}/experts/down"]
    before = old[f"params/{block}/experts/down"]
    np.testing.assert_array_equal(weights[:, :2], before)
    for repeat, source in enumerate((1, 0)):
        difference = weights[repeat, 2] - before[repeat, source]
        assert np.std(difference) == pytest.approx(
            0.5 * np.sqrt(np.mean(before[repeat, source] ** 2)), rel=0.05
        )
    router, column = new[f"params/{block}/router/weight"], old[f"params/{block}/router/weight"]
    assert np.std(router[0, :, 2] - column[0, :, 1]) == pytest.approx(0.5, rel=0.15)
    np.testing.assert_array_equal(
        new[f"params/{block}/router/bias"],
        np.take_along_axis(old[f"params/{block}/router/bias"], change.source_LE, 1),
    )
    moment = f"opt_state/mu/{block}/experts/down"
    np.testing.assert_array_equal(new[moment][1], old[moment][1][[0, 1, 0]])
    row = f"opt_state/row/{block}/router/weight"
    assert new[row] is old[row] and new["opt_state/count"] == 7
    zeroed = carry(old, shapes, change, {(0, 0): [0, 1]}, ZERO)
    assert not zeroed[moment][:, 2].any() and (zeroed[moment][:, :2] == old[moment]).all()
    np.testing.assert_array_equal(zeroed[f"params/{block}/experts/down"][0, 2], before[0, 1])


def test_moments_that_are_factored_otherwise_begin_anew() -> None:
    name = "opt_state/row/stacks/0/blocks/0/mlp/router/weight"
    change = Change(np.array([[0, 1, 1]]), np.array([[False, False, True]]))
    assert carry({name: np.ones((1, 2))}, {name: (1, 4, 3)}, change, {(0, 0): [0]}, ZERO) == {}


def test_dense_layers_find_their_place_among_the_experts() -> None:
    """Two layers in one stack become two stacks, of which the second has experts."""

    def table(*rows: tuple[str, tuple[int, ...], tuple[int, ...]]) -> dict[str, Parameter]:
        return {
            path: Parameter(ParameterPath.parse(path), ("any",) * len(shape), shape, layers)
            for path, shape, layers in rows
        }

    before = table(("stacks/0/blocks/0/mlp/down", (2, 3), (0, 1)))
    after = table(
        ("stacks/0/blocks/0/mlp/down", (2, 3), (0,)),
        ("stacks/0/blocks/1/mlp/experts/down", (4, 2, 3), (1,)),
        ("stacks/0/blocks/1/mlp/router/weight", (2, 4), (1,)),
    )
    down = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    shapes = dict(
        zip((f"params/{path}" for path in after), ((1, 2, 3), (1, 4, 2, 3), (1, 2, 4)), strict=True)
    )
    found = from_dense({"params/stacks/0/blocks/0/mlp/down": down}, before, shapes, after, 4, ZERO)
    np.testing.assert_array_equal(found["params/stacks/0/blocks/0/mlp/down"], down[:1])
    np.testing.assert_array_equal(
        found["params/stacks/0/blocks/1/mlp/experts/down"], np.broadcast_to(down[1], (1, 4, 2, 3))
    )
    assert len(np.unique(found["params/stacks/0/blocks/1/mlp/router/weight"])) == 8


# Runs


@functools.cache
def trained(folder: Path, *overrides: str) -> Path:
    """A run that is trained once for all tests here, none of which changes it."""
    return tiny_run.run(folder, folder / f"resize-{trained.cache_info().misses}", *overrides)


def config_of(run: Path) -> Config:
    return config_from_text((run / "config.yaml").read_text())


def arrays_of(run: Path) -> RunArrays:
    return read_run(run, config_of(run), step=None, fallback=False)


def assert_same(one: RunArrays, other: RunArrays) -> None:
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, other.arrays[name], err_msg=name)
    np.testing.assert_array_equal(one.bias_LE, other.bias_LE)
    assert one.counters == other.counters and one.meta["data"] == other.meta["data"]


def logits_of(folder: Path) -> np.ndarray:
    """After two texts, [2, V]."""
    return Session(open_model(folder), 2).logits([PROMPT, PROMPT[::-1]])


def digests(folder: Path) -> dict[Path, str]:
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def made_run(folder: Path, directory: Path, *overrides: str) -> Path:
    """A run with random parameters and moments, whose experts have the loads 1, 2, 3, ..."""
    config = tiny_run.tiny(folder, *overrides)
    vocab_size = load_tokenizer("bytes").vocab_size
    draw, size = np.random.default_rng(0), config.moe.num_experts
    shape = host_program(config, vocab_size).abstract_state
    leaves = orbax_io.flatten({"params": shape.params, "opt_state": shape.opt_state})
    arrays = {
        name: draw.standard_normal(leaf.shape).astype(leaf.dtype) for name, leaf in leaves.items()
    }
    bias = draw.standard_normal((count_moe_layers(config.model, config.moe), size)).astype(
        np.float32
    )
    counters = {"step": 3, "seed": 5, "skipped": 1, "skipped_in_row": 0}
    layers = [{"layer": layer, "load": [*range(1, size + 1)]} for layer in (0, 1)]
    write_run(
        directory,
        config,
        RunArrays(arrays, bias, counters, {"data": "here"}, vocab_size, "bytes"),
        {"event": "resized", "layers": layers},
    )
    return directory


@pytest.mark.slow
def test_eight_twelve_eight_goes_on_training(folder: Path, tmp_path: Path) -> None:
    first = trained(folder, *EIGHT)
    untouched = digests(first)
    wider, narrower = tmp_path / "wider", tmp_path / "narrower"
    said = resize(first, wider, Wanted(12), step=2)
    assert digests(first) == untouched
    assert said.count("copied") == 2 and said.endswith(f"--run-dir {wider} --resume")
    tiny_run.run(folder, wider, *EIGHT, "moe.num_experts=12", resume=True)
    before, lines = tiny_run.training_lines(first), tiny_run.training_lines(wider)
    assert [line["step"] for line in lines] == [3, 4, 5, 6]
    assert {len(layer["load"]) for line in lines for layer in line["layers"]} == {12}

    said = resize(wider, narrower, Wanted(8), step=4)
    assert said.count("removed") == 2 and "the newest 2 training lines" in said
    assert config_of(narrower) == config_of(first)
    tiny_run.run(folder, narrower, *EIGHT, resume=True)
    lines = [*lines[:2], *tiny_run.training_lines(narrower)]
    assert [line["step"] for line in lines] == [3, 4, 5, 6]
    assert {len(layer["load"]) for line in lines[2:] for layer in line["layers"]} == {8}
    # The same text as without a change, and no jump at either.
    for line, same in zip(lines, before[2:], strict=True):
        assert line["ce_loss"] == pytest.approx(same["ce_loss"], abs=0.05)
    assert lines[-1]["ce_loss"] < before[1]["ce_loss"]


@pytest.mark.parametrize("optimizer", slow_unless("muon".__eq__, ["adamw", "adafactor", "muon"]))
def test_growing_and_shrinking_again_changes_nothing(
    optimizer: str, folder: Path, tmp_path: Path
) -> None:
    wide = (
        ("model.width=128", "moe.hidden=128") if optimizer == "adafactor" else ()
    )  # which factors from 128 on
    run = made_run(folder, tmp_path / "run", *EIGHT, f"optimizer.name={optimizer}", *wide)
    before = arrays_of(run)
    resize(
        run, tmp_path / "wider", Wanted(12, moments="copy" if optimizer == "adafactor" else "zero")
    )
    between = arrays_of(tmp_path / "wider")
    grown = [
        name for name, array in between.arrays.items() if array.shape != before.arrays[name].shape
    ]
    assert sum(name.startswith("params") for name in grown) == 3 and len(grown) > 5
    for name in grown:
        if name.startswith("opt_state") and "experts" in name:
            copied = before.arrays[name][:, [7, 6, 5, 4]]
            np.testing.assert_array_equal(
                between.arrays[name][:, 8:],
                copied if optimizer == "adafactor" else np.zeros_like(copied),
            )
    resize(tmp_path / "wider", tmp_path / "again", Wanted(8))
    assert_same(arrays_of(tmp_path / "again"), before)


@pytest.mark.slow
def test_the_run_that_is_written(folder: Path, tmp_path: Path) -> None:
    run = trained(folder, *EIGHT)
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "resize",
                str(run),
                str(tmp_path / "out"),
                "--experts",
                "10",
                "--step",
                "4",
                "--noise",
                "0",
                "--top-k",
                "1",
            ]
        )
    assert ended.value.code == 0
    config = config_of(tmp_path / "out")
    assert (config.moe.num_experts, config.moe.top_k) == (10, 1)
    [event] = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert (event["event"], event["step"], event["num_experts_before"], event["num_experts"]) == (
        "resized",
        4,
        8,
        10,
    )
    old, new = read_run(run, config_of(run), step=4, fallback=False), arrays_of(tmp_path / "out")
    load = measured_load(run, 4, [0, 1], 8)
    for row, layer in enumerate(event["layers"]):
        busiest = np.argsort(-load.count_LE[row], kind="stable")[:2].tolist()
        assert layer["source"] == [*range(8), *busiest] and layer["load"][8:] == [0, 0]
        for name, array in new.arrays.items():
            if "experts" in name and name.startswith("params"):
                np.testing.assert_array_equal(array[row, 8:], old.arrays[name][row, busiest])
        assert new.bias_LE is not None and old.bias_LE is not None
        np.testing.assert_array_equal(new.bias_LE[row], old.bias_LE[row, layer["source"]])
    # What the traffic file says goes first where it was written with the checkpoint.
    traffic = np.ones((2, 4, 10))
    traffic[:, :, 7] = 9
    written = {
        "version": 1,
        "step": 4,
        "steps": 3,
        "num_experts": 10,
        "layers": [0, 1],
        "traffic": traffic.tolist(),
    }
    (tmp_path / "out" / "traffic.json").write_text(json.dumps(written))
    assert measured_load(tmp_path / "out", 4, [0, 1], 10).count_LE[:, 6:8].tolist() == [[4, 36]] * 2
    assert (
        measured_load(tmp_path / "out", 5, [0, 1], 10).count_LE[0].tolist()
        == event["layers"][0]["load"]
    )


def test_twice_the_experts_and_twice_the_choices_compute_the_same(
    folder: Path, tmp_path: Path
) -> None:
    run = trained(folder, *EIGHT)
    resize(run, tmp_path / "out", Wanted(16, top_k=4, noise=0.0))
    np.testing.assert_allclose(logits_of(tmp_path / "out"), logits_of(run), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 2])
def test_a_dense_run_gets_experts_and_computes_the_same(
    every: int, folder: Path, tmp_path: Path
) -> None:
    run = trained(folder, *DENSE)
    said = resize(run, tmp_path / "out", Wanted(8, top_k=2, every=every, moments="copy"))
    assert ("layers 0, 1 " if every == 1 else "layers 1 ") in said
    np.testing.assert_allclose(logits_of(tmp_path / "out"), logits_of(run), atol=1e-5)
    old, new = arrays_of(run).arrays, arrays_of(tmp_path / "out").arrays
    moments = [name for name in new if "mlp/experts/down" in name and name.startswith("opt_state")]
    assert len(moments) == 2
    for name in moments:
        dense = old[
            re.sub(r"stacks/\d+/blocks/\d+", "stacks/0/blocks/0", name).replace("experts/", "")
        ]
        np.testing.assert_array_equal(
            new[name], np.repeat(dense[-len(new[name]) :, None], 8, axis=1)
        )
    if every > 1:
        return
    config = (*ONE, "moe.num_experts=8", "moe.hidden=32", "moe.dropless=true")
    tiny_run.run(folder, tmp_path / "out", *config, "train.steps=6", resume=True)
    lines = tiny_run.training_lines(tmp_path / "out")
    assert lines[0]["step"] == 4
    assert (
        lines[-1]["ce_loss"]
        < lines[0]["ce_loss"]
        < tiny_run.training_lines(run)[-1]["ce_loss"] + 0.05
    )
    resize(tmp_path / "out", tmp_path / "fewer", Wanted(6))


@pytest.mark.parametrize("optimizer", slow_unless("muon".__eq__, ["adafactor", "muon"]))
def test_moments_of_a_dense_run_go_where_they_belong(
    optimizer: str, folder: Path, tmp_path: Path
) -> None:
    overrides = (
        *DENSE,
        f"optimizer.name={optimizer}",
        "model.width=128",
        "model.hidden=160",
        "model.mlp_bias=true",
    )
    run = made_run(folder, tmp_path / "run", *overrides)
    resize(run, tmp_path / "out", Wanted(4, moments="copy"))
    resize(run, tmp_path / "zero", Wanted(4))
    old, new, zero = (arrays_of(path).arrays for path in (run, tmp_path / "out", tmp_path / "zero"))
    experts = [name for name, array in new.items() if "experts/" in name and array.size > 1]
    assert len(experts) > (8 if optimizer == "adafactor" else 6)
    for name in experts:
        dense = old[name.replace("experts/", "")]
        np.testing.assert_array_equal(new[name], np.repeat(dense[:, None], 4, axis=1), err_msg=name)
        assert zero[name].any() == name.startswith("params"), name
    for name, array in new.items():
        if "/mlp/" not in name and array.size > 1:  # else it may be Adafactor's placeholder
            np.testing.assert_array_equal(array, old[name], err_msg=name)
        elif "router" in name and name.startswith("opt_state"):
            assert not array.any(), name


@pytest.mark.parametrize(
    "case", ["qwen3-window", pytest.param("llama-plain", marks=pytest.mark.slow)]
)
def test_a_dense_folder_becomes_a_run(case: str, folder: Path, tmp_path: Path) -> None:
    origin = make_folder(case, tmp_path / "in")
    file = tmp_path / "train.yaml"
    file.write_text(
        f"data: {{source: {tiny_run.corpus(folder)}}}\nmoe: {{top_k: 1, dropless: true, every: "
        f"2}}\n"
        "train: {steps: 2, global_batch: 4, seq_len: 32, eval_batches: 1, sample_prompt: ''}\n"
    )
    out = tmp_path / "out"
    resize(origin, out, Wanted(4, top_k=2, config=file))
    config = config_of(out)
    assert (config.moe.num_experts, config.moe.top_k, config.moe.every, config.init_from) == (
        4,
        2,
        2,
        None,
    )
    np.testing.assert_allclose(logits_of(out), logits_of(origin), atol=1e-5)
    if case != "llama-plain":
        return
    file.rename(tmp_path / "gone.yaml")
    origin.rename(tmp_path / "gone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_run, "tiny", lambda *_: config)
        tiny_run.run(folder, out, resume=True)
    assert [line["step"] for line in tiny_run.training_lines(out)] == [1, 2]


# Refused


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (Wanted(8), "is the number that"),
        (Wanted(0), "--experts 0 is less than"),
        (Wanted(1), "--experts 1 is less than the 2 that a token takes: give more, or a smaller"),
        (Wanted(12, top_k=13), "--experts 12 is less than the 13 that"),
        (Wanted(12, noise=-0.1), "--noise -0.1"),
        (Wanted(12, noise=float("nan")), "--noise nan"),
        (Wanted(6, noise=0.1), "makes none of 8"),
        (Wanted(12, every=2), "--every"),
        (Wanted(12, config=Path("x.yaml")), "leave --config x.yaml out"),
    ],
)
def test_what_cannot_be_is_refused(wanted: Wanted, says: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says) as error:
        resize(trained(folder, *EIGHT), tmp_path / "out", wanted)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_places_that_are_refused(folder: Path, tmp_path: Path) -> None:
    run = trained(folder, *EIGHT)
    with pytest.raises(UserError, match="exists already"):
        resize(run, tmp_path, Wanted(12))
    with pytest.raises(UserError, match="is a file"):
        resize(run / "config.yaml", tmp_path / "out", Wanted(12))
    with pytest.raises(UserError, match="lies in"):
        resize(run, run / "inside", Wanted(12))
    with pytest.raises(UserError, match="no checkpoint of step 5"):
        resize(run, tmp_path / "out", Wanted(12), step=5)
    with pytest.raises(UserError, match="does not exist"):
        resize(tmp_path / "nothing", tmp_path / "out", Wanted(12))
    moe, dense = (make_folder(case, tmp_path / case) for case in ("qwen3_moe-plain", "llama-plain"))
    with pytest.raises(UserError, match="has experts already"):
        resize(moe, tmp_path / "out", Wanted(12, config=tmp_path / "x.yaml"))
    with pytest.raises(UserError, match="add --config"):
        resize(dense, tmp_path / "out", Wanted(12))


@pytest.mark.parametrize(
    ("overrides", "wanted", "says"),
    [
        (
            ("moe.num_groups=4", "moe.top_groups=2"),
            Wanted(10),
            "--experts 10 do not divide among moe.num_groups=4: give a multiple of 4",
        ),
        (
            DENSE,
            Wanted(8, first_dense=2),
            "--first-dense 2 with --every 1 leaves none of the 2 layers",
        ),
        ((*DENSE, "moe.routed_scale=2.5"), Wanted(8), "moe.routed_scale=2.5 would change"),
        (
            ("placement.max_experts_per_device=5",),
            Wanted(12),
            "placement.max_experts_per_device=5 but 12 experts",
        ),
        ((*DENSE, "model.hidden=32"), Wanted(1), "--experts 1 is less than the 2"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(
    overrides: tuple[str, ...], wanted: Wanted, says: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(tiny_run.tiny(folder, *EIGHT, *overrides)))
    with pytest.raises(UserError, match=says):
        resize(tmp_path, tmp_path.with_name("out"), wanted)


def test_a_load_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    run = tiny_run.copy_until(trained(folder, *EIGHT), tmp_path / "run", 4)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="up to step 4: train the run first"):
        resize(run, tmp_path / "out", Wanted(12))
    (run / "metrics.jsonl").write_text("\n".join(lines).replace('"layer": 1', '"layer": 2') + "\n")
    with pytest.raises(UserError, match="in layers"):
        resize(run, tmp_path / "out", Wanted(12))
    (run / "traffic.json").write_text("{")
    with pytest.raises(UserError, match=r"traffic.json is not JSON"):
        resize(run, tmp_path / "out", Wanted(12))
