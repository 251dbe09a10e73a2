"""A conversation with a model.

    conversation = Conversation(loaded, SamplingOptions(), system="Be brief.")
    for piece in conversation.reply("Hello"):
        print(piece, end="")

Each turn renders the whole conversation with the tokenizer's chat template; the model then reads
only the tokens that its cache does not hold. What the model thinks is not part of its reply: it
does not come back in the conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

from moe_jax.errors import UserError
from moe_jax.generation.generate import Reader, generate
from moe_jax.generation.reasoning import answer_pieces, reply_splitter
from moe_jax.generation.sampling import Sampler
from moe_jax.generation.sampling_options import SamplingOptions
from moe_jax.generation.stats import GenerationStats
from moe_jax.generation.template_options import NOTHING_SAID, TemplateOptions

if TYPE_CHECKING:
    from moe_jax.data.tokenizer import Tokenizer
    from moe_jax.inference.load import LoadedModel

Listener = Callable[[str], None]  # is called with pieces of text


def unheard(text: str) -> None:
    """A listener that does nothing."""


def chat_ids(
    tokenizer: Tokenizer,
    messages: list[dict[str, str]],
    template: TemplateOptions = NOTHING_SAID,
) -> list[int]:
    """Tokens of a conversation up to the reply. Raises UserError if the tokenizer has no chat
    template, or if the template refuses the messages or does not use an option.
    """
    if tokenizer.chat is None:
        raise UserError(
            "the model's tokenizer has no chat template; use `moe-jax generate` without "
            "--system-prompt."
        )
    return tokenizer.chat.prompt(messages, **template.of(tokenizer.chat))


def check_template(
    tokenizer: Tokenizer, system: str | None, template: TemplateOptions = NOTHING_SAID
) -> None:
    """Raises UserError if a conversation could not begin."""
    chat_ids(tokenizer, [*first_messages(system), {"role": "user", "content": "?"}], template)


def first_messages(system: str | None) -> list[dict[str, str]]:
    """How a conversation begins: with the system prompt, if there is one."""
    return [] if system is None else [{"role": "system", "content": system}]


def reply_pieces(
    loaded: LoadedModel,
    reader: Reader,
    prompt: Sequence[int],
    sampler: Sampler,
    reasoning: Listener = unheard,
    **limits: Any,
) -> Generator[str, None, None]:
    """As `generate`, for a prompt that a chat template has written: pieces of the answer alone;
    `reasoning` hears the rest.
    """
    splitter = reply_splitter(loaded.tokenizer, prompt)
    pieces = generate(loaded, reader, prompt, sampler, reply=True, marks=splitter.marks, **limits)
    return answer_pieces(pieces, splitter, reasoning)


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
        template: TemplateOptions = NOTHING_SAID,
        reasoning: Listener = unheard,
    ):
        """`reasoning` is called with what the model thinks, as it comes.

        Raises UserError if the tokenizer has no chat template, or if the template refuses the
        system prompt or an option.
        """
        self.figures = GenerationStats()
        """Of the last reply."""
        self.messages = first_messages(system)
        check_template(loaded.tokenizer, system, template)
        self._loaded, self._system, self._max_tokens, self._stop = loaded, system, max_tokens, stop
        self._template, self._reasoning = template, reasoning
        self._reader = Reader(loaded.session())
        self._sampler = Sampler([options], loaded.tokenizer.num_ids)

    def reset(self) -> None:
        """Forgets all but the system prompt."""
        self.messages = first_messages(self._system)

    def reply(self, text: str) -> Generator[str, None, None]:
        """Pieces of the reply to `text`, as they come. To close the generator is to end the reply.

        When the reply ends, the question and what came of the answer are added to the
        conversation. A reply without an answer adds nothing.

        Raises:
          UserError: the conversation exceeds the context; it is then as it was before.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = chat_ids(self._loaded.tokenizer, asked, self._template)
        if len(ids) >= self._loaded.context:
            raise UserError(
                f"The conversation has {len(ids)} tokens with this message and the model's "
                f"context is {self._loaded.context}: /reset starts again."
            )
        self.figures = GenerationStats()
        said: list[str] = []
        try:
            for piece in reply_pieces(
                self._loaded,
                self._reader,
                ids,
                self._sampler,
                self._reasoning,
                max_tokens=self._max_tokens,
                stop=self._stop,
                figures=self.figures,
            ):
                said.append(piece)
                yield piece
        except KeyboardInterrupt:  # between the cache and what the reader knows of it
            self._reader = Reader(self._loaded.session())
            raise
        finally:
            if reply := "".join(said):
                self.messages = [*asked, {"role": "assistant", "content": reply}]
