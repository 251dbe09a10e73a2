"""A conversation with a model.

    conversation = Conversation(loaded, SamplingOptions(), system="Be brief.")
    for piece in conversation.reply("Hello"):
        print(piece, end="")

Each turn renders the whole conversation with the tokenizer's chat template; the model then reads
only the tokens that its cache does not hold.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from moe_jax.errors import UserError
from moe_jax.generation.generate import Reader, generate
from moe_jax.generation.sampling import Sampler
from moe_jax.generation.sampling_options import SamplingOptions
from moe_jax.generation.stats import GenerationStats

if TYPE_CHECKING:
    from moe_jax.data.tokenizer import Tokenizer
    from moe_jax.inference.load import LoadedModel


def chat_ids(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """Tokens of a conversation up to the reply. Raises UserError if the tokenizer has no chat
    template, or if the template refuses the messages.
    """
    if tokenizer.chat is None:
        raise UserError(
            "--model: its tokenizer has no chat template; use `moe-jax generate` without "
            "--system-prompt."
        )
    return tokenizer.chat(messages)


def check_template(tokenizer: Tokenizer, system: str | None) -> None:
    """Raises UserError if a conversation could not begin."""
    chat_ids(tokenizer, [*first_messages(system), {"role": "user", "content": "?"}])


def first_messages(system: str | None) -> list[dict[str, str]]:
    """How a conversation begins: with the system prompt, if there is one."""
    return [] if system is None else [{"role": "system", "content": system}]


class Conversation:
    """The messages so far and the cache that holds them."""

    def __init__(
        self,
        loaded: LoadedModel,
        options: SamplingOptions,
        *,
        system: str | None = None,
        max_tokens: int = 1024,
        stop: Sequence[str] = (),
    ):
        """Raises UserError if the tokenizer has no chat template, or if the template refuses the
        system prompt.
        """
        self.figures = GenerationStats()
        """Of the last reply."""
        self.messages = first_messages(system)
        check_template(loaded.tokenizer, system)
        self._loaded, self._system, self._max_tokens, self._stop = loaded, system, max_tokens, stop
        self._reader = Reader(loaded.session())
        self._sampler = Sampler([options], loaded.tokenizer.num_ids)

    def reset(self) -> None:
        """Forgets all but the system prompt."""
        self.messages = first_messages(self._system)

    def reply(self, text: str) -> Generator[str, None, None]:
        """Pieces of the reply to `text`, as they come. To close the generator is to end the reply.

        When the reply ends, the question and what came of the reply are added to the conversation.
        An empty reply adds nothing.

        Raises:
          UserError: the conversation exceeds the context; it is then as it was before.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = chat_ids(self._loaded.tokenizer, asked)
        if len(ids) >= self._loaded.context:
            raise UserError(
                f"The conversation has {len(ids)} tokens with this message and the model's "
                f"context is {self._loaded.context}: /reset starts again."
            )
        self.figures = GenerationStats()
        said: list[str] = []
        try:
            for piece in generate(
                self._loaded,
                self._reader,
                ids,
                self._sampler,
                max_tokens=self._max_tokens,
                stop=self._stop,
                figures=self.figures,
                reply=True,
            ):
                said.append(piece)
                yield piece
        finally:
            if reply := "".join(said):
                self.messages = [*asked, {"role": "assistant", "content": reply}]
