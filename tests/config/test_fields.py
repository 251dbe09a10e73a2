"""How a section is declared: bounds, then its own check, on construction."""

from __future__ import annotations

import dataclasses

import pytest

from moe_jax.config.fields import bounds_text, section, setting
from moe_jax.errors import UserError


@section
class Pair:
    """Two numbers."""

    SECTION = "pair."

    low: int = setting(default=1, help="The low one.", ge=0)
    high: float = setting(default=2.0, help="The high one.", gt=0, le=9)

    def check(self) -> None:
        if self.low > self.high:
            raise UserError(f"pair.low={self.low} exceeds pair.high: lower it.")


def test_bounds_come_before_the_sections_own_check() -> None:
    assert dataclasses.astuple(Pair(high=9.0)) == (1, 9.0)
    with pytest.raises(UserError, match=r"pair\.low=-1 is out of range: it must be >= 0\."):
        Pair(low=-1)
    with pytest.raises(UserError, match=r"pair\.high=10\.0 is out of range: it must be > 0, <= 9"):
        Pair(low=11, high=10.0)
    with pytest.raises(UserError, match=r"pair\.low=3 exceeds pair\.high"):
        Pair(low=3)
    assert [bounds_text(field.metadata) for field in dataclasses.fields(Pair)] == [
        ">= 0",
        "> 0, <= 9",
    ]


def test_a_section_needs_no_check_and_is_frozen() -> None:
    @section
    class Plain:
        SECTION = ""

        size: int = setting(default=1, help="A size.", ge=1)

    with pytest.raises(UserError, match="size=0 is out of range"):
        Plain(size=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Plain().size = 2


def test_a_section_with_its_own_post_init_is_refused() -> None:
    class Mistaken:
        def __post_init__(self) -> None:
            raise AssertionError

    with pytest.raises(TypeError, match="Mistaken has a __post_init__: name it check"):
        section(Mistaken)
