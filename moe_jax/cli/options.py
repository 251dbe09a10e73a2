"""The options of the commands, each declared once, and `spread`, which puts a whole group of them
into a command.

    @dataclass(frozen=True)
    class Flags:
        temperature: Temperature = 0.8

    @spread
    def chat(model: Model, *, flags: Flags) -> None: ...   # MODEL and --temperature

A group is a frozen dataclass whose fields are the types below. It may check itself in
`__post_init__`, before the command begins.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_jax import __version__
from moe_jax.errors import UserError
from moe_jax.generation.streaming import EMPTY_STOP
from moe_jax.generation.template_options import TemplateOptions
from moe_jax.runtime.devices import check_platform, use_platform
from moe_jax.runtime.distributed import (
    JOIN_SECONDS,
    ProcessGroup,
    compare_processes,
    join_processes,
)
from moe_jax.utils.files import local_path

if TYPE_CHECKING:
    from moe_jax.generation.sampling_options import SamplingOptions


def option(*names: str, help: str, **rest: Any) -> Any:
    """An option whose help says what it is by default, or that has no default."""
    return typer.Option(*names, show_default=False, help=help, **rest)


def path_option(*names: str, help: str, **rest: Any) -> Any:
    """An option that takes a path of this machine, `~` included; it refuses URLs."""
    return option(*names, help=help, parser=local_path, **rest)


def path_argument(metavar: str, *, help: str) -> Any:
    """An argument that takes such a path; it has no default that is worth showing."""
    return typer.Argument(metavar=metavar, show_default=False, help=help, parser=local_path)


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer is to see it: a parameter whose type is a dataclass becomes one
    keyword for each of its fields, from which the dataclass is made when the command is called.
    """
    hints = typing.get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if dataclasses.is_dataclass(hints[name]):
            groups[name] = hints[name]
            parameters += _parameters(hints[name])
        else:
            keyword = inspect.Parameter.KEYWORD_ONLY
            parameters.append(parameter.replace(annotation=hints[name], kind=keyword))

    @functools.wraps(command)
    def call(**values: Any) -> None:
        for name, group in groups.items():
            fields = dataclasses.fields(group)
            values[name] = group(**{field.name: values.pop(field.name) for field in fields})
        command(**values)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def _parameters(group: Any) -> list[inspect.Parameter]:
    """A keyword-only parameter for each field of a dataclass."""
    hints = typing.get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty
            if field.default is dataclasses.MISSING
            else field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(group)
    ]


# A command's subject

RunDir = Annotated[Path, path_argument("RUN_DIR", help="Directory of a run.")]
_MODEL = path_argument(
    "MODEL", help="Hugging Face folder, run, converted folder, or name on the hub."
)
Model = Annotated[Path, _MODEL]
Out = Annotated[Path, path_argument("OUT", help="Folder to write; it must not exist.")]
Step = Annotated[
    int | None,
    option("--step", metavar="N", min=0, help="Checkpoint step of a run; the newest if not given."),
]
Fallback = Annotated[
    bool,
    typer.Option(
        "--fallback", help="Use the newest good checkpoint where the wanted one is corrupt."
    ),
]


@dataclasses.dataclass(frozen=True)
class ModelArgument:
    """Which model: MODEL by position, or as --model, which was its only spelling once."""

    model: Annotated[Path | None, _MODEL] = None
    model_option: Annotated[Path | None, path_option("--model", hidden=True, help="As MODEL.")] = (
        None
    )

    def __post_init__(self) -> None:
        if self.model is None and self.model_option is None:
            raise UserError(
                "MODEL is missing: name a Hugging Face folder, a run, a converted folder, or a "
                "model on the hub such as Qwen/Qwen3-30B-A3B."
            )
        if self.model is not None and self.model_option is not None:
            raise UserError(
                f"two models are given, {self.model} and --model {self.model_option}: name one."
            )

    @property
    def path(self) -> Path:
        """The one that was given."""
        path = self.model if self.model_option is None else self.model_option
        assert path is not None
        return path


# Where a command computes

Platform = Annotated[
    str | None,
    option(
        "--platform",
        metavar="NAME",
        help="cpu, cuda, rocm, tpu, metal or metal-on-cpu.  [default: the fastest there is]",
    ),
]

# Commands that compute: they start themselves once more with huge pages, and may be several
# processes.
COMPUTING = ("train", "generate", "chat", "eval", "bench", "serve")


@dataclasses.dataclass(frozen=True)
class ProcessFlags:
    """The platform of this process, and how it finds the others of its command, where there are
    several.
    """

    platform: Platform = None
    coordinator: Annotated[
        str | None,
        option(
            "--coordinator",
            metavar="HOST:PORT",
            help="One of several processes: where process 0 can be reached.  [default: as the "
            "cluster says]",
        ),
    ] = None
    num_processes: Annotated[
        int | None, option("--num-processes", metavar="N", min=1, help="How many there are.")
    ] = None
    process_id: Annotated[
        int | None, option("--process-id", metavar="I", min=0, help="Which one this is, from 0.")
    ] = None
    join_timeout: Annotated[
        float,
        typer.Option("--join-timeout", metavar="S", min=1, help="Seconds to find one another."),
    ] = JOIN_SECONDS

    def __post_init__(self) -> None:
        check_platform(self.platform)
        self._group()

    def _group(self) -> ProcessGroup:
        return ProcessGroup(self.coordinator, self.num_processes, self.process_id)

    def join(self, **same: str) -> None:
        """Chooses the platform and joins the other processes, if there are any, before JAX starts.

        Raises UserError where there is no such platform, the others cannot be found, or one of them
        was started with something that is not the `same`.
        """
        use_platform(self.platform)
        join_processes(self._group(), seconds=self.join_timeout)
        compare_processes("version of moe-jax", __version__)
        for name, text in same.items():
            compare_processes(name.replace("_", " "), text)


# How a model is held

Mesh = Annotated[
    str | None, option("--mesh", metavar="AXES", help="Devices, such as expert=4,tensor=2.")
]
Dtype = Annotated[str | None, option("--dtype", metavar="TYPE", help="float32 or bfloat16.")]
Quantize = Annotated[
    str | None, option("--quantize", metavar="TYPE", help="Weights in int8 or int4.")
]
Group = Annotated[
    int, typer.Option("--group", metavar="N", min=2, help="int4: weights that share a scale.")
]
ExpertCacheSize = Annotated[
    int | None,
    option(
        "--expert-cache-size", metavar="N", min=1, help="Keep N experts per layer on the device."
    ),
]
Memory = Annotated[
    str | None,
    option("--memory", metavar="SIZE", help="Refuse to take more per device, such as 24GiB."),
]
Context = Annotated[
    int | None,
    option("--context", metavar="N", min=1, help="Tokens of a text.  [default: the model's]"),
]
Simulate = Annotated[
    int | None,
    option(
        "--simulate",
        metavar="N",
        min=1,
        help="Simulated CPU devices.  [default: on CPU, the mesh's]",
    ),
]

# Text

Temperature = Annotated[
    float,
    typer.Option("--temperature", min=0.0, metavar="T", help="Divides the logits; 0 is --greedy."),
]
TopP = Annotated[
    float | None,
    option("--top-p", metavar="P", min=0.0, max=1.0, help="Choose among the likeliest of sum P."),
]
TopK = Annotated[
    int | None, option("--top-k", metavar="K", min=1, help="Choose among the K likeliest tokens.")
]
MinP = Annotated[
    float | None,
    option("--min-p", metavar="P", min=0.0, max=1.0, help="Drop those below P x the likeliest."),
]
Penalty = Annotated[
    float,
    typer.Option("--repetition-penalty", metavar="X", help="Against repeated tokens; 1 is none."),
]
Greedy = Annotated[bool, typer.Option("--greedy", help="Always take the likeliest token.")]
Seed = Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Seed of the sampling.")]
Stop = Annotated[
    list[str] | None,
    option("--stop", metavar="TEXT", help="End before this text; may be repeated."),
]
System = Annotated[
    str | None,
    option(
        "--system-prompt",
        metavar="TEXT",
        help="What the model is told first, by its chat template.",
    ),
]
Thinking = Annotated[
    str | None,
    option("--thinking", metavar="on|off", help="Whether the model reasons before it answers."),
]
TemplateKwargs = Annotated[
    list[str] | None,
    option(
        "--template-kwargs",
        metavar="KEY=VALUE",
        help="A variable of the chat template; may be repeated.",
    ),
]
ShowReasoning = Annotated[
    bool | None,
    typer.Option(
        "--show-reasoning/--hide-reasoning",
        show_default=False,
        help="Reasoning on stderr.  [default: on a terminal]",
    ),
]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", min=1, metavar="N", help="Tokens to generate at most.")
]
Text = Annotated[Path, path_option("--text", metavar="FILE", help="UTF-8 text.")]
Window = Annotated[
    int | None,
    option(
        "--window",
        metavar="N",
        min=1,
        help="Tokens per window.  [default: context, at most 2048]",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")]


@dataclasses.dataclass(frozen=True)
class SamplingFlags:
    """How the next token is chosen, and what ends the text."""

    temperature: Temperature = 0.8
    top_p: TopP = None
    top_k: TopK = None
    min_p: MinP = None
    repetition_penalty: Penalty = 1.0
    greedy: Greedy = False
    seed: Seed = 0
    stop: Stop = None

    def __post_init__(self) -> None:
        if not all(self.stop or []):
            raise UserError(EMPTY_STOP)

    def sampling(self) -> SamplingOptions:
        """What the sampler is to do. Raises UserError for a value out of its range."""
        from moe_jax.generation.sampling_options import SamplingOptions

        try:
            return SamplingOptions(
                temperature=0.0 if self.greedy else self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                seed=self.seed,
            )
        except UserError as error:  # which names the setting as Python has it
            name, _, rest = str(error).partition("=")
            raise UserError(f"--{name.replace('_', '-')} {rest}") from error


@dataclasses.dataclass(frozen=True)
class ReplyFlags:
    """What the chat template is told, and what is seen of a reply."""

    thinking: Thinking = None
    template_kwargs: TemplateKwargs = None
    show_reasoning: ShowReasoning = None

    def __post_init__(self) -> None:
        if self.thinking not in (None, "on", "off"):
            raise UserError(f"--thinking {self.thinking!r} is unknown: choose on or off.")
        for text in self.template_kwargs or []:
            name, equals, _ = text.partition("=")
            if not equals or not name.isidentifier():
                raise UserError(
                    f"--template-kwargs {text!r} cannot be read: write it as enable_thinking=false."
                )

    def template(self) -> TemplateOptions:
        """What the template is told; a value is read as JSON where it is JSON."""
        pairs = (text.partition("=") for text in self.template_kwargs or [])
        variables = {name: _json_or_text(value) for name, _, value in pairs}
        return TemplateOptions(None if self.thinking is None else self.thinking == "on", variables)

    def require_template(self, used: bool) -> None:
        """Raises UserError for options of a chat template where none is used."""
        shown = "--show-reasoning" if self.show_reasoning else "--hide-reasoning"
        given = {
            "--thinking": self.thinking,
            "--template-kwargs": self.template_kwargs,
            shown: self.show_reasoning,
        }
        names = [name for name, value in given.items() if value is not None]
        if names and not used:
            raise UserError(
                f"{names[0]} is for replies by the chat template: give --system-prompt too, or "
                f"use moe-jax chat."
            )


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value.lower() if value in ("True", "False") else value)
    except ValueError:
        return value
