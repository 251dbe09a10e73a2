"""Quantities as words."""

from __future__ import annotations

from moe_jax.utils.units import less


def test_a_fall_and_a_rise() -> None:
    words = {0.14: "14% less", -0.14: "14% more", 0.0: "0% less"}
    assert {fraction: less(fraction) for fraction in words} == words
    assert less(-0.0312, digits=1) == "3.1% more"
