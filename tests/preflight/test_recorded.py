"""What configurations and docs/pods.md promise, held to what `moe-jax preflight` measured last:
compiling a large model takes minutes, so it is recorded (python scripts/record_preflights.py RUN).

Arguments and what the experts' exchange sends follow from shapes, and must be those of today.
Temporaries are as they were measured, by the versions that stand beside them.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from moe_jax.config.schema import Config
from moe_jax.models.layer_pattern import count_moe_layers
from moe_jax.parallel.collectives import AXES
from moe_jax.profiling.memory import per_device
from moe_jax.training.placement.initial import mesh_topology
from moe_jax.training.trainer import make_program
from tests.support import ROOT

spec = importlib.util.spec_from_file_location(
    "record_preflights", ROOT / "scripts" / "record_preflights.py"
)
assert spec is not None and spec.loader is not None
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

RECORDED = script.recorded()

# What no machine has had the time for: a name goes when its record comes.
UNMEASURED = {*script.RUNS} - {"small-gpu"}


def promise(path: Path) -> tuple[int, float] | None:
    """Devices, and bytes of each, that the `Needs:` line of a configuration names."""
    needs = re.search(r"^# Needs:(.*?)^# \w+:", path.read_text(), re.MULTILINE | re.DOTALL)
    assert needs is not None, path
    text = re.sub(r"\s*\n#\s*", " ", needs[1])
    named = re.search(r"(\d[\d,]*|one) (?:devices|GPU) (?:of|with) (\d+) GB", text)
    if named is None:
        return None
    count = 1 if named[1] == "one" else int(named[1].replace(",", ""))
    return count, 1e9 * int(named[2])


PROMISES = {
    path.stem: promised
    for path in sorted((ROOT / "configs").glob("*.yaml"))
    if (promised := promise(path)) is not None
}


def test_what_has_no_record_is_named():
    assert {"qwen3-30b-a3b", "mixtral-8x7b", "finetune", "small-gpu"} == PROMISES.keys()
    assert PROMISES.keys() <= script.ALL.keys()
    assert script.unmeasured() == UNMEASURED
    text = (ROOT / "docs/pods.md").read_text()
    for name in UNMEASURED:
        assert f"moe-jax {' '.join(script.ALL[name].words)}" in text, name


@pytest.mark.parametrize("name", sorted(PROMISES.keys() & RECORDED.keys()))
def test_every_program_fits_the_devices_that_a_configuration_names(name):
    devices, memory = PROMISES[name]
    recorded = RECORDED[name]
    assert recorded["devices"] == devices and recorded["programs"]
    for program, sizes in recorded["programs"].items():
        assert not sizes["refused"] and sizes["peak_bytes"] <= memory, program


@pytest.mark.parametrize("name", RECORDED)
def test_a_record_is_of_the_settings_of_today(name):
    run, recorded = script.ALL[name], RECORDED[name]
    config = run.load()
    assert recorded["command"] == " ".join(run.words)
    assert recorded["settings"] == script.settings(config), (
        f"configs/{run.config}.yaml has changed: python scripts/record_preflights.py {name!r}"
    )
    if "train_step" in recorded["programs"]:
        passes = exchanges_of(recorded["programs"]["train_step"], config)
        assert passes is None or passes == pytest.approx(round(passes), rel=0.02)


def exchanges_of(step: dict[str, Any], config: Config) -> float | None:
    """How often the rows of a layer's pools cross the expert axis for each part of the batch, by
    what was sent; None where that depends on the tokens or on how a rank's devices share the rows,
    or where head and embedding cross that axis too, as there is no other.
    """
    model, moe, train, ranks = config.model, config.moe, config.train, config.mesh.expert
    if moe.dropless or ranks == 1 or config.mesh.tensor > 1 or config.mesh.data == 1:
        return None
    tokens = train.global_batch * train.seq_len / train.accumulation / config.mesh.size
    rows = moe.capacity_factor * tokens * moe.top_k
    size = rows * model.width * {"bfloat16": 2, "float32": 4}[model.compute_dtype]
    sent = size * (ranks - 1) / ranks * count_moe_layers(model, moe) * train.accumulation
    crossed = [
        one["bytes"]
        for one in step["collectives"]
        if one["kind"] == "all-to-all" and one["axes"] == ["expert"]
    ]
    return sum(crossed) / sent


# One of each kind: a model's parameters take a second or two to describe.
@pytest.mark.parametrize(
    "name", [n for n in ("qwen3-30b-a3b", "mixtral-8x7b on 32", "deepseek-v3") if n in RECORDED]
)
def test_arguments_are_what_the_state_takes_today(name):
    recorded, config = RECORDED[name], script.ALL[name].load()
    chip = {"platform": "tpu", "device_kind": "TPU v5", "process_index": 0}
    chips = np.array([Mock(jax.Device, id=n, **chip) for n in range(config.mesh.size)])
    shape = (config.mesh.data, config.mesh.expert, config.mesh.tensor)
    mesh = Mesh(chips.reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)
    program = make_program(
        config, config.model.vocab_size, mesh, mesh_topology(config, mesh), saved=None
    )
    held = per_device(program.abstract_state, program.state_shardings)
    sizes = {"train_step": "argument_bytes", "initial_state": "output_bytes"}
    for program in sizes.keys() & recorded["programs"].keys():
        assert recorded["programs"][program][sizes[program]] == pytest.approx(held, rel=0.02)


def test_a_training_step_takes_no_more_on_more_chips():
    """Less where gradients are in more parts; what the exchanges send per chip stays."""
    measured = [RECORDED[name] for name in script.SCALING]
    temporaries = [one["programs"]["train_step"]["temp_bytes"] for one in measured]
    for fewer, more in itertools.pairwise(temporaries):
        assert more <= 1.06 * fewer
    sent = [script.sent(one, "all-to-all") for one in measured]
    assert max(sent) <= 1.03 * min(sent)


def test_the_tables_for_pods_are_the_record():
    text = (ROOT / "docs/pods.md").read_text()
    for name, recorded in RECORDED.items():
        assert script.row(name, recorded) in text, name
        assert f"moe-jax {recorded['command']}" in text, name
