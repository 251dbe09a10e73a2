"""Groups of options that commands share: what `spread` makes of a command, and what flags check."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from pathlib import Path

import pytest
import typer

from moe_jax.cli import main, placement
from moe_jax.cli.inference import bench, chat, evaluate, generate
from moe_jax.cli.model_options import ModelOptions
from moe_jax.cli.options import Dtype, Greedy, Model, SamplingFlags, Seed, spread
from moe_jax.errors import UserError
from moe_jax.utils.files import local_path


@dataclasses.dataclass(frozen=True)
class Flags:
    """A group of two options."""

    greedy: Greedy = False
    seed: Seed = 3


def names(command) -> list[str]:
    return list(inspect.signature(command).parameters)


def test_a_group_becomes_a_keyword_for_each_of_its_fields() -> None:
    calls = []

    @spread
    def command(model: Model, *, flags: Flags, dtype: Dtype = None) -> None:
        """Help."""
        calls.append((model, flags, dtype))

    assert names(command) == ["model", "greedy", "seed", "dtype"] and command.__doc__ == "Help."
    signature = inspect.signature(command)
    assert signature.parameters["seed"].default == 3
    assert signature.parameters["model"].default is inspect.Parameter.empty
    command(model="here", greedy=True, seed=5, dtype="float32")
    assert calls == [("here", Flags(greedy=True, seed=5), "float32")]


def test_typer_reads_names_defaults_and_bounds_of_a_group() -> None:
    seen = []

    @spread
    def command(*, flags: Flags) -> None:
        seen.append(flags)

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command)
    for arguments, code in (([], 0), (["--seed", "7", "--greedy"], 0), (["--seed", "-1"], 2)):
        with pytest.raises(SystemExit) as caught:
            app(arguments)
        assert caught.value.code == code
    assert seen == [Flags(), Flags(greedy=True, seed=7)]


def test_commands_that_run_a_model_have_the_same_options() -> None:
    model = [field.name for field in dataclasses.fields(ModelOptions)]
    flags = [field.name for field in dataclasses.fields(SamplingFlags)]
    for command in (generate, chat, evaluate, bench):
        own = names(command)
        assert [name for name in own if name in model] == model
        assert [name for name in own if name in flags] == (
            flags if command in (generate, chat) else []
        )


def paths_of(app: typer.Typer) -> list[tuple[str, str, object]]:
    """(command, parameter, what reads it) for each parameter of a command that is a path."""
    found = []
    for command in app.registered_commands:
        hints = typing.get_type_hints(command.callback, include_extras=True)
        for name, hint in hints.items():
            kind, *notes = typing.get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
            if kind is Path or Path in typing.get_args(kind):
                (note,) = notes
                found.append((command.name or command.callback.__name__, name, note.parser))
    return found


def test_every_path_of_every_command_knows_the_home_folder_and_urls() -> None:
    paths = paths_of(main.app) + paths_of(placement.app)
    assert len({command for command, _, _ in paths}) == 22
    assert [path for path in paths if path[2] is not local_path] == []


def test_flags_become_sampling_options() -> None:
    options = SamplingFlags(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, seed=4).sampling()
    assert (options.temperature, options.top_k, options.top_p) == (0.5, 3, 0.9)
    assert (options.min_p, options.repetition_penalty, options.seed) == (0.1, 1.0, 4)
    assert SamplingFlags(temperature=0.5, greedy=True).sampling().temperature == 0.0
    with pytest.raises(UserError, match=r"--stop is empty: give the text to stop at"):
        SamplingFlags(stop=["fine", ""])
    with pytest.raises(
        UserError, match=r"^--repetition-penalty 0\.0 is out of range: it must be > 0\.$"
    ):
        SamplingFlags(repetition_penalty=0.0).sampling()
