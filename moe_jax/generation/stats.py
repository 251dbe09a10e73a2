"""What a generation took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ENDINGS = {"context": "the context of {context} tokens is full", "interrupted": "interrupted"}


@dataclass
class GenerationStats:
    """What a generation took, filled in while it runs. Seconds are without compiling."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    """Of the prompt's tokens, those that the cache held already."""
    prompt_seconds: float = 0.0
    tokens: int = 0
    """Tokens of the text, the one that ends it not among them."""
    steps: int = 0
    """Tokens that the model read one by one; the first token needs none, being part of reading the
    prompt.
    """
    step_seconds: float = 0.0
    compile_seconds: float = 0.0
    ended: Literal["end", "stop", "tokens", "context", "interrupted"] = "interrupted"
    """By the model, at a stop string, at `max_tokens`, at the context's end, or because the caller
    stopped listening.
    """

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens read per second; 0 if none was."""
        return (
            (self.prompt_tokens - self.reused_tokens) / self.prompt_seconds
            if self.prompt_seconds
            else 0.0
        )

    @property
    def rate(self) -> float:
        """Tokens generated per second; 0 if there was no step."""
        return self.steps / self.step_seconds if self.steps else 0.0

    def sentence(self, context: int) -> str:
        """One line: tokens and speed of both parts, and why the text ended if not by itself."""
        cached = f" ({self.reused_tokens:,} of them cached)" if self.reused_tokens else ""
        parts = [f"prompt {self.prompt_tokens:,} tokens{cached}, {self.prompt_rate:,.1f} tokens/s"]
        parts.append(
            f"generated {self.tokens:,} tokens"
            + (f", {self.rate:,.1f} tokens/s" if self.steps else "")
        )
        if self.ended in ENDINGS:
            parts.append(ENDINGS[self.ended].format(context=f"{context:,}"))
        return "; ".join(parts)
