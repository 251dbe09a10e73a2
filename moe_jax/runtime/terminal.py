"""The terminal of this process."""

from __future__ import annotations

import codecs
import functools
import importlib.util
import io
import sys

ESCAPED = "moe_jax.escaped"  # the name of our way to write what an encoding lacks


def edit_typed_lines() -> None:
    """Gives `input` line editing and history from now on, where the system has them."""
    if importlib.util.find_spec("readline"):  # Windows has none
        import readline  # noqa: F401  # whose import is the whole effect


def print_any_character() -> None:
    """From now on stdout writes a character that its encoding lacks as `\\u4e13` instead of
    failing, and stderr, which does so in any case, says it once.
    """
    codecs.register_error(ESCAPED, _escape)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=ESCAPED)


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    if (
        isinstance(error, UnicodeEncodeError) and error.encoding != "utf-8"
    ):  # which lacks nothing but what is no character
        _say_what_is_escaped(sys.stdout.encoding)
    return codecs.backslashreplace_errors(error)


@functools.cache
def _say_what_is_escaped(encoding: str) -> None:
    print(
        f"moe-jax: standard output is {encoding}; characters that it lacks are written as "
        f"\\u4e13: PYTHONIOENCODING=utf-8 shows them.",
        file=sys.stderr,
    )
