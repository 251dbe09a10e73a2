"""Quantities as words."""

from __future__ import annotations

import pytest

from moe_jax.utils.units import gibibytes, less, one_of_these


def test_a_fall_and_a_rise() -> None:
    words = {0.14: "14% less", -0.14: "14% more", 0.0: "0% less"}
    assert {fraction: less(fraction) for fraction in words} == words
    assert less(-0.0312, digits=1) == "3.1% more"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1023, "1,023 bytes"),
        (1024, "1.0 KiB"),
        (72_448, "70.8 KiB"),
        (2**20, "1.0 MiB"),
        (2**30 - 1, "1,024.0 MiB"),
        (3 * 2**29, "1.50 GiB"),
        (2**41, "2,048.00 GiB"),
    ],
)
def test_a_size_has_the_unit_that_shows_it(size: int, text: str) -> None:
    assert gibibytes(size) == text


def test_alternatives() -> None:
    assert [one_of_these(["a", "b", "c"][:count]) for count in (1, 2, 3)] == [
        "a",
        "a or b",
        "a, b or c",
    ]
