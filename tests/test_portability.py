"""scripts/portability.py: which programs it compares, and that the plug-ins can run them."""

from __future__ import annotations

import importlib.util
import json
from types import ModuleType
from typing import Any

import pytest

from moe_jax import hf
from tests.support import ROOT
from tests.support.metal_plugins import plugin

RELEASES = ("jax-mps-0.10.11", "metaljax-0.11.9")
QUICK = (
    *("qwen3_moe-plain/bfloat16/prefill", "qwen3_moe-plain/float32/decode"),
    *("gpt_oss-plain/int4/decode", "sampling/filtered"),
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "portability", ROOT / "scripts" / "portability.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def findings(script: ModuleType, release: str, *names: str) -> list[Any]:
    """What comes of the programs whose names begin so."""
    chosen = [program for program in script.programs() if program.name.startswith(names)]
    assert len(chosen) >= len(names)
    with plugin(release) as table:
        return [script.examine(program, [table]) for program in chosen]


def test_programs_are_those_of_every_family_in_every_form(script: ModuleType) -> None:
    names = [program.name for program in script.programs()]
    assert len(set(names)) == len(names) > 200
    for family in hf.FAMILIES:
        own = [name.split("/")[1:] for name in names if name.startswith(f"{family}-")]
        for held in ("float32", "bfloat16", "int8", "int4"):
            assert [held, "prefill"] in own and [held, "decode"] in own
        assert ["float32", "train"] in own and ["bfloat16", "train"] in own


@pytest.mark.parametrize("release", RELEASES)
def test_nothing_is_missing(script: ModuleType, release: str) -> None:
    for finding in findings(script, release, *QUICK):
        assert finding.missing == [], finding.name
        assert finding.ops > 0
        decodes = finding.name.endswith("/decode")
        assert decodes == (finding.ops_per_layer is not None)
        assert not decodes or 0 < finding.ops_per_layer < min(finding.ops, script.BUDGET)


def test_a_budget_that_is_exceeded_counts_as_missing(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "BUDGET", 10)
    (finding,) = findings(script, "jax-mps-0.10.11", "llama-plain/float32/decode")
    assert finding.missing == [f"{finding.ops_per_layer} operations per layer, more than 10"]


def test_a_release_for_another_jax_is_told(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script.jax, "__version__", "0.10.1")
    assert [table.name for table in script.tables_of("jax-mps")] == ["jax-mps 0.10.11"]
    assert capsys.readouterr().err == ""
    assert [table.name for table in script.tables_of("metaljax")] == ["metaljax 0.11.9"]
    assert "metaljax 0.11.9 asks for jax <0.12,>=0.11 and this is 0.10.1" in capsys.readouterr().err


def test_the_report_counts_what_is_missing(script: ModuleType) -> None:
    tables = script.tables_of("jax-mps")
    counted = script.Finding("a/int8/decode", [], 20, 7)
    lacking = script.Finding("b", ["stablehlo.fft: not registered"], 9, None)
    found = [counted, lacking, lacking._replace(name="c")]
    said = script.text_of(tables, found)
    assert "2  stablehlo.fft: not registered   first in b" in said
    assert "1 can run; 2 lack something" in said
    assert said.endswith(f"of a decoding step, at most {script.BUDGET}: int8 7.")
    programs = json.loads(json.dumps(script.report(tables, found)))["programs"]
    assert programs[1] == lacking._asdict() | {"name": "b"}


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_nothing_is_missing_anywhere(script: ModuleType, release: str) -> None:
    # A representative part, as the whole takes minutes: `scripts/portability.py` compares it.
    held = {"jax-mps-0.10.11": ("bfloat16", "int4"), "metaljax-0.11.9": ("int8",)}[release]
    endings = tuple(f"{form}/decode" for form in held)
    cases = sorted(path.stem for path in script.CASES.glob("*.json"))
    first = {case.partition("-")[0]: f"{case}/" for case in reversed(cases)}
    assert first.keys() == set(hf.FAMILIES)
    chosen = [
        program.name
        for program in script.programs()
        if program.name.startswith(tuple(first.values())) and program.name.endswith(endings)
    ]
    chosen += ["llama-dynamic/bfloat16/chunk", f"{first['deepseek_v3']}float32/train"]
    chosen += [f"{first['qwen3_moe']}bfloat16/train", "sampling/"]
    for finding in findings(script, release, *chosen):
        assert finding.missing == [], finding.name
