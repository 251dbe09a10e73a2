"""A conversation in the terminal, or through a pipe line by line."""

from __future__ import annotations

import itertools
import re
import signal
import sys
from collections.abc import Iterator

from moe_jax.cli.console import write_pieces
from moe_jax.cli.reasoning import ReasoningWriter
from moe_jax.errors import UserError
from moe_jax.generation.chat import Conversation
from moe_jax.runtime.distributed import broadcast_text, is_first, process_count
from moe_jax.runtime.signals import noted_signals, until_noted
from moe_jax.runtime.terminal import edit_typed_lines
from moe_jax.utils.progress import say

HELP = """/reset   forget the conversation (not the system prompt)
/quit    leave; so does Ctrl-D
/help    this list
Ctrl-C stops a reply. Anything else is said to the model."""


def run_chat(conversation: Conversation, context: int, writer: ReasoningWriter) -> None:
    """Reads messages and commands until the end of stdin or /quit, and answers each. Only replies
    go to stdout.
    """
    typed = sys.stdin.isatty() and sys.stdout.isatty()  # else the prompt would be among the replies
    for line in _shared_lines(typed):
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
            try:
                _answer(conversation, line, context, writer)
            except KeyboardInterrupt:  # the second one
                if not typed:
                    raise
                print()
                say("The reply is broken off; what was said before is kept. /quit leaves.")


def _answer(conversation: Conversation, text: str, context: int, writer: ReasoningWriter) -> None:
    """Streams one reply. A mistake, such as a full context, is one sentence, and the chat goes
    on.
    """
    try:
        with noted_signals(signal.SIGINT, at_once=_say_stopping) as interrupts:
            write_pieces(writer.around(until_noted(interrupts, conversation.reply(text))))
    except UserError as error:
        say(str(error))
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    stats = conversation.figures
    say(stats.sentence(context) + ("; /reset starts again" if stats.ended == "context" else ""))


def _say_stopping() -> None:
    say("The reply stops after this token; Ctrl-C once more breaks it off.")


def _shared_lines(typed: bool) -> Iterator[str]:
    """The lines that the first process reads, on all of them."""
    if process_count() == 1:
        yield from _lines(typed)
        return
    own = _lines(typed) if is_first() else iter(())
    for number in itertools.count():
        line = next(own, None)
        told = None if not is_first() else "" if line is None else f">{line}"
        told = broadcast_text(f"line {number}", told)
        if not told:  # the end
            return
        yield told[1:]


def _lines(typed: bool) -> Iterator[str]:
    """Lines of stdin without surrounding blanks: typed, with line editing and history, or from a
    pipe, without a prompt.
    """
    if typed:
        edit_typed_lines()
        say("/help lists the commands.")
    while True:
        try:
            line = input("> ") if typed else sys.stdin.readline()
        except EOFError:  # Ctrl-D
            print()
            return
        except UnicodeDecodeError as error:
            raise UserError(
                f"standard input holds bytes that are not text (byte {error.start}): give UTF-8."
            ) from error
        except KeyboardInterrupt:
            if not typed:
                raise
            print()
            say("Ctrl-D or /quit leaves.")
            continue
        if not line and not typed:
            return
        yield line.removeprefix("\ufeff").strip()
