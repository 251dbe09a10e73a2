"""The probes of faults that plug-ins for Metal have: right arithmetic passes them, wrong fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.launch import doctor, metal_probes
from moe_jax.launch.metal_probes import KNOWN_FAULTS, KnownFault
from moe_jax.launch.probes import WrongArithmetic
from moe_jax.launch.small_model import RECORDED, small_model_logits
from moe_jax.runtime.metal import METAL_ON_CPU
from moe_jax.runtime.platform import stand_in


@pytest.fixture(autouse=True)
def as_before():
    platforms = jax.config.jax_platforms
    yield
    stand_in(None)
    jax.config.update("jax_platforms", platforms)


def test_the_recorded_logits_are_those_of_the_programs_for_the_cpu() -> None:
    np.testing.assert_allclose(small_model_logits(), np.array(RECORDED), atol=2e-6)


@pytest.mark.slow
def test_doctor_looks_for_them_through_the_record_of_metal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the CPU all is right. A fault that the package works round is no problem, others are."""
    monkeypatch.setattr(doctor, "split_cpu", lambda devices: None)
    monkeypatch.setattr(doctor, "PROBES", [])
    found = doctor.examine(METAL_ON_CPU)
    assert found.problems == [] and found.machine["programs_for"] == "metal"
    names = [fault.name for fault in KNOWN_FAULTS]
    assert [(probe.name, probe.status) for probe in found.probes[1:]] == [(n, "ok") for n in names]

    def wrong() -> str:
        raise WrongArithmetic("element (0,) is 1 instead of 2")

    faults = (KnownFault("sort", wrong, remedy="stop"), KnownFault("dot", wrong, workaround="so"))
    monkeypatch.setattr(metal_probes, "KNOWN_FAULTS", faults)
    found = doctor.examine(METAL_ON_CPU)
    assert found.problems == ["sort computes wrong numbers: element (0,) is 1 instead of 2; stop."]
    doctor.print_examination(found, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed["probes"][2] == {
        "name": "dot",
        "status": "avoided",
        "text": "element (0,) is 1 instead of 2; so",
        "remedy": "",
    }


def test_every_fault_says_what_comes_of_it() -> None:
    assert all(bool(fault.workaround) != bool(fault.remedy) for fault in KNOWN_FAULTS)


def damaged(function: Callable[..., Any], damage: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda *args, **options: jax.tree.map(damage, function(*args, **options))


# What a faulty plug-in does, planted into JAX.
PLANTED = {
    "stacked loop outputs": (jax.lax, "scan", lambda a: a.at[..., 0].set(0)),
    "top-k ties": (jax.lax, "top_k", lambda a: a[..., ::-1]),
    "bf16 dot to f32": (jnp, "matmul", lambda a: a.astype(jnp.bfloat16)),
    "sort": (jnp, "argsort", lambda a: a[::-1]),
    "sort by two keys": (jax.lax, "sort", lambda a: a[::-1]),
    "bf16 dot": (jax.lax, "dot_general", lambda a: jnp.minimum(a, 256)),
    "model of two layers": (jax.lax, "dot_general", lambda a: a * 1.01),
    "grouped matmul": (jax.lax, "dot_general", lambda a: a.at[0].add(1)),
    "packed grouped matmul": (jax.lax, "dot_general", lambda a: a * 1.1),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, function, damage = PLANTED[name]
    fault = next(fault for fault in KNOWN_FAULTS if fault.name == name)
    monkeypatch.setattr(place, function, damaged(getattr(place, function), damage))
    with pytest.raises(WrongArithmetic):
        fault.probe()
