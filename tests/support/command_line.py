"""The command's own parser, to check commands that are written down somewhere."""

from __future__ import annotations

from typing import Any

import typer

from moe_jax.cli.main import app

COMMAND: Any = typer.main.get_command(app)  # of click, which typer carries a copy of


def check_command(words: list[str]) -> None:
    """Raises for `moe-jax WORDS` if there is no such command or option."""
    command, words = COMMAND, list(words)
    context = command.make_context("moe-jax", [], resilient_parsing=True)
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, f"moe-jax {words[0]}"
        command = command.commands[words.pop(0)]
        context = type(context)(command, parent=context)
    command.make_parser(context).parse_args(
        [*words, ""]
    )  # an option that is named alone gets an argument
