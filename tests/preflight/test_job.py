"""`moe-jax preflight` on simulated devices: figures, JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_jax.config.schema import Config, MeshConfig, TrainConfig
from moe_jax.errors import UserError
from moe_jax.preflight.advice import remedies
from moe_jax.preflight.bounds import link_of
from moe_jax.preflight.chips import GPUS, Chip, Target
from moe_jax.preflight.measure import Measured, Sent, compile_all
from moe_jax.preflight.programs import Planned
from moe_jax.preflight.serving import Serving
from tests.support.command import call

SMALL = (
    *("model.num_layers=1", "model.width=32", "model.num_heads=2", "model.num_kv_heads=2"),
    *("model.vocab_size=64", "moe.num_experts=4", "moe.hidden=16", "train.seq_len=16"),
    *("train.global_batch=8", "devices.simulate=0"),
)


def arguments(*sets: str, topology: str = "cpu:8") -> list[str]:
    """The command line of a small run."""
    words = ["preflight", "configs/tiny.yaml", "--topology", topology]
    return words + [word for pair in (*SMALL, *sets) for word in ("--set", pair)]


@pytest.fixture(scope="module")
def small() -> dict:
    """The result for a model of one layer."""
    from moe_jax.config.load import load_config
    from moe_jax.preflight.job import preflight
    from tests.support import ROOT

    moving = ("placement.strategy=balanced", "placement.replan_every=2")
    config = load_config(ROOT / "configs/tiny.yaml", [*SMALL, *moving])
    return json.loads(json.dumps(preflight("cpu:8", config).as_json()))


def test_programs_and_their_sizes(small):
    programs = {one["name"]: one for one in small["programs"]}
    assert list(programs) == [
        *("initial_state", "train_step", "evaluation"),
        *("checkpoint_checksum", "checkpoint_slot_checksums", "migration"),
    ]
    step = programs["train_step"]
    # The new state takes the place of the old one.
    assert step["peak_bytes"] < step["argument_bytes"] + step["output_bytes"] + step["temp_bytes"]
    assert step["peak_bytes"] >= step["argument_bytes"] + step["temp_bytes"]
    initial, evaluation = programs["initial_state"], programs["evaluation"]
    assert abs(initial["output_bytes"] - step["argument_bytes"]) < 2_000  # and a batch
    # Two moments lie there while the parameters are evaluated.
    assert evaluation["resident_bytes"] > evaluation["argument_bytes"]
    state = step["argument_bytes"]
    for name in ("checkpoint_checksum", "checkpoint_slot_checksums", "migration"):
        held = programs[name]["argument_bytes"] + programs[name]["resident_bytes"]
        assert abs(held - state) < 2_000, name
    assert programs["migration"]["collectives"][0]["kind"] == "collective-permute"
    assert small["temp_bytes"] == step["temp_bytes"] > 0
    assert small["compile_seconds"] == step["compile_seconds"] > 0
    assert small["fits"] and all(one["fits"] for one in programs.values())


def test_only_the_programs_that_are_named(capsys):
    assert call(*arguments(), "--program", "checkpoint_checksum", "--json") == 0
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert [one["name"] for one in told["programs"]] == ["checkpoint_checksum"]
    assert printed.err.count("compiling") == 1
    assert call(*arguments(), "--program", "migration") == 2  # experts do not move
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--program migration is none of this run: choose initial_state, train_step," in error


def test_collectives_of_the_step(small):
    step = next(one for one in small["programs"] if one["name"] == "train_step")
    sent = {(one["kind"], tuple(one["axes"])): one for one in step["collectives"]}
    pools = sent["all-to-all", ("expert",)]
    assert pools["devices"] == 4 and pools["times"] == 5 and not pools["dynamic"]
    # Rows of 16 tokens x 2 choices x 1.25 / 4 ranks = 10 per pool: four times, there and back in
    # both directions, and their slots once more.
    assert pools["bytes"] == 4 * 4 * 10 * 32 * 4 * 3 // 4 + 4 * 10 * 4 * 3 // 4
    assert small["collective_bytes"] == sum(one["bytes"] for one in step["collectives"])
    assert small["all_to_all_hidden_fraction"] == 0


def test_the_bound_is_what_its_parts_say(small):
    step = next(one for one in small["programs"] if one["name"] == "train_step")
    bound, rates = step["bound_seconds"], small["assumed_rates"]
    # Three times the forward pass: experts, router, attention and head for 16 tokens a device.
    assert bound["flops"] == pytest.approx(step["flops"] / rates["flops"])
    moved = step["argument_bytes"] + step["output_bytes"]
    assert bound["memory"] == pytest.approx(moved / rates["memory"])
    assert bound["links"] == bound["exposed"]  # nothing is hidden, and there is one link
    assert bound["links"] == pytest.approx(small["collective_bytes"] / rates["links"])
    assert bound["all"] == max(bound["flops"], bound["memory"]) + bound["exposed"]
    assert {one["link"] for one in step["collectives"]} == {"this machine"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A configuration whose model is small."""
    from moe_jax.config.load import dump_config, load_config
    from tests.support import ROOT

    path = tmp_path_factory.mktemp("model") / "small.yaml"
    path.write_text(dump_config(load_config(ROOT / "configs/tiny.yaml", list(SMALL))))
    return str(path)


def test_serving(model, capsys):
    words = ["preflight", "--serve", model, "--topology", "cpu:4", "--rows", 4, "--prompt", 16]
    assert call(*words, "--context", 32, "--quantize", "int8", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    prefill, decode = result["programs"]
    assert (prefill["name"], decode["name"]) == ("prefill", "decode")
    # A prefill is of one row; the cache of the three others lies beside it: keys and values of
    # 256 places and 2 heads of 16, in f32.
    assert prefill["resident_bytes"] in (heads * 3 * 2 * 256 * 16 * 4 for heads in (1, 2))
    added = decode["argument_bytes"] - prefill["argument_bytes"]
    assert abs(added - prefill["resident_bytes"]) < 2_000
    assert result["temp_bytes"] == decode["temp_bytes"] and result["fits"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), "nothing to compile: give CONFIG, or --serve MODEL"),
        (("--serve", "MODEL", "--mesh", "expert=2"), "--topology cpu:4 has 4: give a mesh of 4"),
        (("--serve", "MODEL", "--mesh", "data=4", "--rows", "6"), "--rows 6 is not divisible"),
        (("--serve", "nowhere.yaml"), "nowhere.yaml does not exist"),
    ],
)
def test_what_cannot_be_served(words, named, model, capsys):
    given = [model if word == "MODEL" else word for word in words]
    assert call("preflight", *given, "--topology", "cpu:4") == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1


def program(name: str, **sizes: int) -> Measured:
    """A measured program with these sizes, else zeros."""
    fields = dict.fromkeys(
        ("argument_bytes", "output_bytes", "temp_bytes", "code_bytes", "resident_bytes"), 0
    )
    fields |= {"peak_bytes": 0, "compile_seconds": 0, "flops": 0} | sizes
    return Measured(name=name, collectives=(), **fields)


class Failing:
    """Stands for a program that the compiler cannot compile."""

    def __init__(self, message: str):
        self.message = message

    def as_text(self) -> str:
        return ""

    def compile(self) -> None:
        raise jax.errors.JaxRuntimeError(self.message)


@pytest.mark.parametrize("name", ["train_step", "decode"])
def test_a_failure_of_the_compiler_is_one_sentence(name):
    target = Target("cpu:1", Chip("small", 10e9, 1e12, 1e12, 1e9, 0), jax.devices()[:1])
    mesh = jax.sharding.Mesh(np.array(target.devices), ("data",))

    def compiled(message: str) -> list[Measured]:
        planned = Planned(name, lambda: Failing(message), 0, 0)
        return list(compile_all([planned], target, mesh))

    with pytest.raises(UserError) as failure:
        compiled("INTERNAL: RET_CHECK failure (some_pass.cc:1) opcode() == kAdd.\nBacktrace: ...")
    text = str(failure.value)
    assert text.count("\n") == 0 and f"--topology cpu:1: the compiler failed at {name}" in text
    assert '"INTERNAL: RET_CHECK failure (some_pass.cc:1) opcode() == kAdd"' in text
    assert ("train.accumulation=1" in text) == (name == "train_step")
    # What does not fit is measured, and the other programs are compiled too.
    refused = compiled("RESOURCE_EXHAUSTED: Ran out. Used 21.4G of 15.75G hbm. More.")[0].refused
    assert refused == "needs 21.4G of 15.75G hbm"


def test_remedies_of_what_does_not_fit():
    chip = Chip("small", 10e9, 1e12, 1e12, 1e9, 0)
    target = Target("none", chip, [])
    config = Config(
        mesh=MeshConfig(data=2), train=TrainConfig(global_batch=8, accumulation=2), name="x"
    )
    step = program("train_step", peak_bytes=12 * 10**9, argument_bytes=6 * 10**9)
    remat, accumulation, mesh = remedies([step], target, config, None)
    assert "model.remat=full" in remat
    assert "train.accumulation=4 halves the 2 rows" in accumulation
    assert "takes 6.0 GB" in mesh and "mesh.data=4" in mesh
    assert remedies([program("train_step", peak_bytes=9)], target, config, None) == []
    served = Serving(Path("model"), rows=8)
    advice = remedies([program("decode", peak_bytes=11 * 10**9)], target, None, served)
    assert [text.split()[0] for text in advice] == ["--quantize", "--rows"]


def test_links_of_hosts_with_eight_gpus():
    class Grid:
        """Stands for a mesh: only places are asked for."""

        devices = np.arange(16)

    chip = GPUS["h100"]
    sent = Sent("all-gather", ("expert",), tuple(range(8)), 1, 1, 0, False)
    assert link_of(sent, chip, Grid()) == ("NVLink", 4.5e11)
    across = sent._replace(members=tuple(range(16)))
    assert link_of(across, chip, Grid()) == ("network", 5e10 * 8)
    exchanged = across._replace(kind="all-to-all")
    assert link_of(exchanged, chip, Grid()) == ("network", 5e10 * 15 / 8)


@pytest.mark.parametrize(
    ("topology", "named"),
    [
        ("v9:4x4", "--topology v9:4x4 is unknown"),
        ("v5p", "--topology v5p is unknown"),
        ("gpu:h900x8", "gpu:h100x64"),
        ("cpu:0", "--topology cpu:0 is unknown"),
        ("cpu:4", "is 8 devices and --topology cpu:4 has 4: set a mesh of 4, such as"),
    ],
)
def test_topologies_that_cannot_be(topology, named, capsys):
    assert call(*arguments(topology=topology)) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
