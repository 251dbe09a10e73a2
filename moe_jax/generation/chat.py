"""A conversation with a model in the terminal, or through a pipe line by line.

    conversation = Conversation(loaded, SamplingOptions(), system="Be brief.")
    for piece in conversation.reply("Hello"):
        print(piece, end="")

Each turn renders the whole conversation with the tokenizer's chat template and reads only what the cache does not hold.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import signal
import sys
from collections.abc import Generator, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING

from moe_jax.cli.console import write_pieces
from moe_jax.errors import UserError
from moe_jax.generation.generate import Reader, generate
from moe_jax.generation.sampling import Sampler, SamplingOptions
from moe_jax.generation.stats import GenerationStats
from moe_jax.utils.progress import say

if TYPE_CHECKING:
    from moe_jax.data.tokenizer import Tokenizer
    from moe_jax.inference.load import LoadedModel

HELP = """/reset   forget the conversation (not the system prompt)
/quit    leave; so does Ctrl-D
/help    this list
Ctrl-C stops a reply. Anything else is said to the model."""


def chat_ids(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """Tokens of a conversation up to the reply. Raises UserError where the tokenizer has no chat template or it refuses."""
    if tokenizer.chat is None:
        raise UserError("--model: its tokenizer has no chat template; use `moe-jax generate` without --system-prompt.")
    return tokenizer.chat(messages)


def check_template(tokenizer: Tokenizer, system: str | None) -> None:
    """Raises UserError where a conversation could not begin, before there is one."""
    chat_ids(tokenizer, [*first_messages(system), {"role": "user", "content": "?"}])


def first_messages(system: str | None) -> list[dict[str, str]]:
    """How a conversation begins: with the system prompt, if there is one."""
    return [] if system is None else [{"role": "system", "content": system}]


class Conversation:
    """The messages so far and the cache that holds them."""

    def __init__(
        self, loaded: LoadedModel, options: SamplingOptions, *, system: str | None = None, max_tokens: int = 1024, stop: Sequence[str] = ()
    ):
        """Raises UserError where the tokenizer has no chat template, or it refuses the system prompt."""
        from moe_jax.inference.load import Session

        self.figures = GenerationStats()
        """Of the last reply."""
        self.messages = first_messages(system)
        check_template(loaded.tokenizer, system)
        self._loaded, self._system, self._max_tokens, self._stop = loaded, system, max_tokens, stop
        self._reader = Reader(Session(loaded))
        self._sampler = Sampler(options, loaded.tokenizer.num_ids)

    def reset(self) -> None:
        """Forgets all but the system prompt."""
        self.messages = first_messages(self._system)

    def reply(self, text: str) -> Generator[str, None, None]:
        """Pieces of the reply to `text`, as they come; whoever stops listening has ended the reply there.

        Question and reply become part of the conversation when the reply ends, as far as it came; an empty one leaves it as
        it was.

        Raises:
          UserError: the conversation exceeds the context; it is then as it was before.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = chat_ids(self._loaded.tokenizer, asked)
        if len(ids) >= self._loaded.context:
            raise UserError(
                f"The conversation has {len(ids)} tokens with this message and the model's context is {self._loaded.context}: "
                "/reset begins anew."
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


def run_chat(conversation: Conversation, context: int) -> None:
    """Reads messages and commands until the end of stdin or /quit, and answers each; replies alone go to stdout."""
    for line in _lines():
        command = re.fullmatch(r"/[a-z]+", line)
        if line == "/quit":
            return
        if line == "/reset":
            conversation.reset()
            say("The conversation is forgotten.")
        elif line == "/help":
            say(HELP)
        elif command:
            say(f"{line} is no command: /help lists them.")
        elif line:
            _answer(conversation, line, context)


def _answer(conversation: Conversation, text: str, context: int) -> None:
    """Streams one reply; a mistake such as a full context is one sentence, after which the chat goes on."""
    try:
        with _noted_interrupts() as interrupts:
            write_pieces(_until(interrupts, conversation.reply(text)))
    except UserError as error:
        say(str(error))
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    figures = conversation.figures
    say(figures.sentence(context) + ("; /reset begins anew" if figures.ended == "context" else ""))


def _until(interrupts: list[int], pieces: Generator[str, None, None]) -> Iterator[str]:
    """The pieces until Ctrl-C. It is looked at between tokens, so that the model's cache is never left half written."""
    for piece in pieces:
        yield piece
        if interrupts:
            pieces.close()  # which keeps what was said
            return


@contextlib.contextmanager
def _noted_interrupts() -> Iterator[list[int]]:
    """A list that the first Ctrl-C makes true; a second one acts as it would without us."""
    noted: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        signal.signal(number, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _lines() -> Iterator[str]:
    """Lines of stdin without surrounding blanks: typed, with line editing and history, or from a pipe, without a prompt."""
    typed = sys.stdin.isatty() and sys.stdout.isatty()  # else the prompt would be among the replies
    if typed:
        if importlib.util.find_spec("readline"):  # Windows has none
            import readline  # noqa: F401  # gives input() editing and history
        say("/help lists the commands.")
    while True:
        try:
            line = input("> ") if typed else sys.stdin.readline()
        except EOFError:  # Ctrl-D
            print()
            return
        except UnicodeDecodeError as error:
            raise UserError(f"standard input holds bytes that are not text (byte {error.start}): give UTF-8.") from error
        except KeyboardInterrupt:
            if not typed:
                raise
            print()
            say("Ctrl-D or /quit leaves.")
            continue
        if not line and not typed:
            return
        yield line.strip()
