"""How a row's next token is chosen. Needs the standard library alone: a command reads it before
JAX.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe_jax.errors import UserError


@dataclass(frozen=True)
class SamplingOptions:
    """How a token is chosen. Raises UserError for a value out of its range."""

    temperature: float = 0.8
    """Logits are divided by it; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Choose among the k likeliest tokens."""
    top_p: float | None = None
    """Choose among the likeliest tokens whose chances add up to this (nucleus sampling: Holtzman et
    al., 2020).
    """
    min_p: float | None = None
    """Choose among tokens at least this times as likely as the likeliest (Nguyen et al., 2024)."""
    repetition_penalty: float = 1.0
    """Tokens that occurred: positive logits are divided, negative ones multiplied by it (Keskar et
    al., 2019); 1 is none.
    """
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fine, range_text in (
            ("temperature", 0 <= self.temperature < math.inf, ">= 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, ">= 1"),
            ("top_p", self.top_p is None or 0 <= self.top_p <= 1, "between 0 and 1"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "> 0"),
            ("seed", self.seed >= 0, ">= 0"),
        ):
            if not fine:
                raise UserError(
                    f"{name}={getattr(self, name)!r} is out of range: it must be {range_text}."
                )
