"""How much a serving engine holds, and whether a model can be served so."""

from __future__ import annotations

from dataclasses import dataclass

from moe_jax.errors import UserError
from moe_jax.inference.session import SHORTEST_PROMPT
from moe_jax.models.serving_plan import ServingPlan


@dataclass(frozen=True)
class EngineSize:
    """How much an engine holds. Raises UserError for what cannot be."""

    max_batch: int
    """Requests that run at once: rows of a step."""
    context: int
    """Tokens of a request, those of its prompt and of its answer together."""
    cache_tokens: int | None = None
    """Tokens whose keys and values are held, of all requests together; by default `context` for
    each of `max_batch`.
    """
    chunk: int = 128
    """Tokens of a prompt that are read between two steps, and that can be shared."""
    block: int = 64
    """Tokens of a block of the cache."""
    balance_every: int | None = None
    """Steps between two plans of where experts are; None: they stay where they are."""

    def __post_init__(self) -> None:
        for name, value in (("--max-batch", self.max_batch), ("--max-context", self.context)):
            if value < 1:
                raise UserError(f"{name} {value} must be at least 1.")
        if self.cache_tokens is not None and self.cache_tokens < self.context:
            raise UserError(
                f"--cache-tokens {self.cache_tokens} must have room for one request of "
                f"--max-context {self.context} tokens: raise it, or lower --max-context."
            )
        # So no block of a padded chunk is padding alone.
        if self.chunk not in (self.block, 2 * self.block) or self.block < SHORTEST_PROMPT:
            raise ValueError(f"a chunk of {self.chunk} is not one or two blocks of {self.block}")

    @property
    def parts(self) -> int:
        """Blocks of a whole context."""
        return -(-self.context // self.chunk) * self.chunk // self.block

    @property
    def full_blocks(self) -> int:
        """Blocks of layers that see everything, with the one that nobody owns."""
        if self.cache_tokens is None:
            return 1 + self.max_batch * self.parts
        return 1 + max(self.parts, -(-self.cache_tokens // self.block))

    def window_blocks(self, window: int) -> int:
        """Blocks of layers with a window, with the one that nobody owns: for all rows what they
        see, and once more as much to be shared.
        """
        seen = min(self.parts, (window + self.block - 2) // self.block + 1)
        return 1 + 2 * self.max_batch * seen + self.chunk // self.block


def check_served(plan: ServingPlan, size: EngineSize) -> None:
    """Raises UserError where the model's mesh or its positions cannot be served."""
    if plan.mesh.shape["data"] > 1:
        raise UserError(
            f"--mesh with data={plan.mesh.shape['data']} cannot be served: use expert and tensor, "
            f"or start a server for each copy of the model."
        )
    rope = plan.model.rope
    if rope.scaling == "dynamic" and size.context > rope.original_length:
        raise UserError(
            f"--max-context {size.context}: beyond {rope.original_length} tokens this model's "
            f"positions depend on the longest text that is read with it (rope scaling dynamic), so "
            f"a server cannot keep requests apart: use --max-context {rope.original_length}."
        )
