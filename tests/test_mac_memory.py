"""The memory table of docs/mac.md is what is computed; its models have their published sizes."""

from __future__ import annotations

import importlib.util

import pytest

from tests.support import ROOT

spec = importlib.util.spec_from_file_location("mac_memory", ROOT / "scripts" / "mac_memory.py")
assert spec is not None and spec.loader is not None
mac_memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mac_memory)


def test_the_table_is_what_is_computed() -> None:
    assert mac_memory.PAGE.read_text(encoding="utf-8") == mac_memory.page()


@pytest.mark.parametrize(
    ("name", "billions"), [("Qwen3-30B-A3B", 30.5), ("gpt-oss-20b", 20.9), ("OLMoE-1B-7B", 6.92)]
)
def test_a_model_has_its_published_size(name: str, billions: float) -> None:
    described = mac_memory.describe(name)
    held = mac_memory.inspect(described, dtype="bfloat16").parameters
    assert sum(held.values()) / 1e9 == pytest.approx(billions, rel=0.01)
