"""The commands that run a model: generate, chat, eval and bench; `cli.py` adds them to `moe-jax`.

Thin like `cli.py`: each reads its arguments, opens the model and calls one function of the package.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_jax.cli.console import explained_disk_errors, prompt_from_stdin, write_pieces
from moe_jax.cli.model_options import ModelChoice, Opened
from moe_jax.errors import UserError
from moe_jax.model_io.source import require_run
from moe_jax.utils.progress import say
from moe_jax.utils.units import gibibytes

if TYPE_CHECKING:
    from moe_jax.data.tokenizer import Tokenizer
    from moe_jax.generation.evaluate import Evaluation
    from moe_jax.generation.sampling import SamplingOptions


def _option(*names: str, metavar: str | None = None, help: str, **bounds: Any) -> Any:
    return typer.Option(*names, metavar=metavar, show_default=False, help=help, **bounds)


Fallback = Annotated[
    bool,
    typer.Option(
        "--fallback", help="Use the newest good checkpoint where the wanted one is corrupt."
    ),
]
Model = Annotated[
    Path, _option("--model", metavar="DIR", help="Hugging Face folder, run or converted folder.")
]
Mesh = Annotated[
    str | None, _option("--mesh", metavar="AXES", help="Devices, such as expert=4,tensor=2.")
]
Dtype = Annotated[str | None, _option("--dtype", metavar="TYPE", help="float32 or bfloat16.")]
Quantize = Annotated[
    str | None, _option("--quantize", metavar="TYPE", help="Weights in int8 or int4.")
]
Group = Annotated[
    int, typer.Option("--group", metavar="N", min=2, help="int4: weights that share a scale.")
]
ExpertCacheSize = Annotated[
    int | None,
    _option(
        "--expert-cache-size", metavar="N", min=1, help="Keep N experts a layer on the device."
    ),
]
Memory = Annotated[
    str | None,
    _option("--memory", metavar="SIZE", help="Refuse to take more a device, such as 24GiB."),
]
Simulate = Annotated[
    int | None,
    _option(
        "--simulate",
        metavar="N",
        min=1,
        help="Simulated CPU devices.  [default: on CPU, the mesh's]",
    ),
]
Step = Annotated[
    int | None,
    _option(
        "--step", metavar="N", min=0, help="Checkpoint step of a run; the newest if not given."
    ),
]
Temperature = Annotated[
    float, typer.Option(min=0.0, metavar="T", help="Logits are divided by it; 0 is --greedy.")
]
TopP = Annotated[
    float | None,
    _option("--top-p", metavar="P", min=0.0, max=1.0, help="Choose among the likeliest of sum P."),
]
TopK = Annotated[
    int | None, _option("--top-k", metavar="K", min=1, help="Choose among the K likeliest tokens.")
]
MinP = Annotated[
    float | None,
    _option("--min-p", metavar="P", min=0.0, max=1.0, help="Drop those below P x the likeliest."),
]
Penalty = Annotated[
    float, typer.Option(metavar="X", help="Tokens that occurred lose by it; 1 is none.")
]
Greedy = Annotated[bool, typer.Option("--greedy", help="Always take the likeliest token.")]
Seed = Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the sampling.")]
Stop = Annotated[
    list[str] | None,
    _option("--stop", metavar="TEXT", help="End before this text; may be repeated."),
]
System = Annotated[
    str | None,
    _option(
        "--system-prompt",
        metavar="TEXT",
        help="What the model is told first, by its chat template.",
    ),
]
MaxTokens = Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to generate at most.")]
Text = Annotated[Path, _option("--text", metavar="FILE", help="UTF-8 text.")]
WindowOption = Annotated[
    int | None,
    _option(
        "--window", metavar="N", min=1, help="Tokens of a window.  [default: context, at most 2048]"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")]


def generate(
    prompt: Annotated[
        str, _option("--prompt", metavar="TEXT", help="Text to continue; - reads it from stdin.")
    ],
    run_dir: Annotated[
        Path | None, typer.Argument(show_default=False, help="Directory of a run.")
    ] = None,
    model: Annotated[
        Path | None,
        _option("--model", metavar="DIR", help="Or: Hugging Face, run or converted folder."),
    ] = None,
    system_prompt: System = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.8,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = 1.0,
    greedy: Greedy = False,
    seed: Seed = 0,
    stop: Stop = None,
    mesh: Mesh = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    group: Group = 64,
    expert_cache_size: ExpertCacheSize = None,
    memory: Memory = None,
    simulate: Simulate = None,
    step: Step = None,
    fallback: Fallback = False,
) -> None:
    """Continue a text with a model, on stdout; speeds on stderr."""
    choice = ModelChoice(
        _one_place(run_dir, model),
        mesh,
        dtype,
        quantize,
        memory,
        simulate,
        step,
        fallback,
        group,
        expert_cache_size,
    )
    text = prompt_from_stdin() if prompt == "-" else prompt
    options = _sampling(
        0.0 if greedy else temperature, top_p, top_k, min_p, repetition_penalty, seed
    )
    _check_texts(text, stop)
    with explained_disk_errors(Path("standard output")):
        _generate(choice, text, options, system_prompt, max_tokens, stop or [])


def _one_place(run_dir: Path | None, model: Path | None) -> Path:
    """The folder that either the argument or --model names."""
    if (run_dir is None) == (model is None):
        raise UserError("generate needs one model: give either a run directory or --model DIR.")
    if run_dir is not None:
        require_run(run_dir)
    return run_dir or model  # type: ignore[return-value]


def _check_texts(prompt: str, stop: list[str] | None) -> None:
    if not prompt:
        raise UserError("--prompt is empty: give at least one character to continue.")
    if not all(stop or []):
        raise UserError("--stop is empty: give the text to stop at, or leave it out.")


def _sampling(
    temperature: float,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    repetition_penalty: float,
    seed: int,
) -> SamplingOptions:
    from moe_jax.generation.sampling import SamplingOptions

    return SamplingOptions(temperature, top_k, top_p, min_p, repetition_penalty, seed)


def _generate(
    choice: ModelChoice,
    prompt: str,
    options: SamplingOptions,
    system: str | None,
    max_tokens: int,
    stop: list[str],
) -> None:
    """Streams the text to stdout, then speeds and memory to stderr."""
    from moe_jax.generation.chat import chat_ids, first_messages
    from moe_jax.generation.generate import Reader, check_length
    from moe_jax.generation.generate import generate as pieces
    from moe_jax.generation.stats import GenerationStats

    def tokens(tokenizer: Tokenizer) -> list[int]:
        if system is not None:
            return chat_ids(
                tokenizer, [*first_messages(system), {"role": "user", "content": prompt}]
            )
        # Training gives a run's model no start token.
        return tokenizer.encode(prompt) if choice.is_run else tokenizer.encode_prompt(prompt)

    def check(tokenizer: Tokenizer, context: int) -> None:
        if not choice.is_run:
            check_length(tokens(tokenizer), context)

    opened = choice.open(check)
    from moe_jax.generation.sampling import Sampler
    from moe_jax.profiling import machine

    loaded, figures = opened.model, GenerationStats()
    ids = tokens(loaded.tokenizer)
    sampler = Sampler([options], loaded.tokenizer.num_ids)
    limits: dict[str, Any] = {
        "max_tokens": max_tokens,
        "stop": stop,
        "slide": choice.is_run,
        "reply": system is not None,
    }
    write_pieces(pieces(loaded, Reader(loaded.session()), ids, sampler, figures=figures, **limits))
    if sys.stdout.isatty():
        sys.stdout.write("\n")
    say(figures.sentence(loaded.context))
    compiled = opened.compile_seconds + figures.compile_seconds
    say(
        f"loaded in {opened.seconds:,.1f} s, compiled in {compiled:,.1f} s; peak memory "
        f"{gibibytes(machine.peak_bytes())}"
    )
    _say_experts(choice, opened)


def _say_experts(choice: ModelChoice, opened: Opened) -> None:
    """What --expert-cache-size came to."""
    counts = None if choice.expert_cache is None else opened.model.engine.expert_counts
    if counts is not None:
        say(
            f"experts: {counts.hit_rate:.1%} found on the device, "
            f"{gibibytes(counts.bytes_per_token)} fetched a token"
        )


def chat(
    model: Model,
    system_prompt: System = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.8,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = 1.0,
    greedy: Greedy = False,
    seed: Seed = 0,
    stop: Stop = None,
    mesh: Mesh = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    group: Group = 64,
    expert_cache_size: ExpertCacheSize = None,
    memory: Memory = None,
    simulate: Simulate = None,
    step: Step = None,
    fallback: Fallback = False,
) -> None:
    """Talk with a model: /help, /reset, /quit; Ctrl-C stops a reply."""
    choice = ModelChoice(
        model, mesh, dtype, quantize, memory, simulate, step, fallback, group, expert_cache_size
    )
    options = _sampling(
        0.0 if greedy else temperature, top_p, top_k, min_p, repetition_penalty, seed
    )
    _check_texts("?", stop)
    from moe_jax.cli.chat import run_chat
    from moe_jax.generation.chat import Conversation, check_template

    opened = choice.open(lambda tokenizer, context: check_template(tokenizer, system_prompt))
    conversation = Conversation(
        opened.model, options, system=system_prompt, max_tokens=max_tokens, stop=stop or []
    )
    say(
        f"{opened.model.name}, loaded in {opened.seconds:,.1f} s, context "
        f"{opened.model.context:,} tokens"
    )
    with explained_disk_errors(Path("standard output")):
        run_chat(conversation, opened.model.context)
    from moe_jax.profiling import machine

    say(f"peak memory {gibibytes(machine.peak_bytes())}")
    _say_experts(choice, opened)


def evaluate(
    model: Model,
    text: Text,
    window: WindowOption = None,
    mesh: Mesh = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    group: Group = 64,
    expert_cache_size: ExpertCacheSize = None,
    memory: Memory = None,
    simulate: Simulate = None,
    step: Step = None,
    fallback: Fallback = False,
    as_json: AsJson = False,
) -> None:
    """Perplexity of a text: nats a token, bits a byte."""
    choice = ModelChoice(
        model, mesh, dtype, quantize, memory, simulate, step, fallback, group, expert_cache_size
    )
    found = {
        "model": str(model),
        "text": str(text),
        "quantize": quantize,
        **_evaluated(choice, text, window)._asdict(),
    }
    if as_json:
        beyond = found["perplexity"] == float("inf")  # which JSON cannot say
        print(json.dumps(found | {"perplexity": None} if beyond else found, indent=2))
        return
    print(f"perplexity      {found['perplexity']:,.4f}")
    print(f"nats a token    {found['nats_per_token']:.5f}")
    print(f"bits a byte     {found['bits_per_byte']:.5f}")
    print(
        f"{found['tokens']:,} tokens in windows of {found['window']:,}, "
        f"{found['tokens'] / found['seconds']:,.1f} tokens/s"
    )


def _evaluated(choice: ModelChoice, text: Path, window: int | None) -> Evaluation:
    """Opens the model and scores the text; the model is let go of at the end."""
    from moe_jax.generation.evaluate import evaluate as score
    from moe_jax.generation.evaluate import read_text

    content = read_text(text)  # before anything is loaded
    opened = choice.open()
    found = score(
        opened.model, content, window, special=not choice.is_run
    )  # training gives a run no start token
    _say_experts(choice, opened)
    return found


def bench(
    model: Model,
    prompt: Annotated[
        int, typer.Option("-p", "--prompt-tokens", min=1, metavar="N", help="Tokens to read.")
    ] = 512,
    generated: Annotated[
        int, typer.Option("-g", "--generate-tokens", min=1, metavar="N", help="Tokens to generate.")
    ] = 128,
    batch: Annotated[
        int, typer.Option("-b", "--batch", min=1, metavar="N", help="Rows at a time.")
    ] = 1,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, metavar="N", help="Timed repeats; medians are shown.")
    ] = 5,
    text: Annotated[
        Path | None,
        _option("--text", metavar="FILE", help="With --quantize: perplexity on it, of both."),
    ] = None,
    window: WindowOption = None,
    mesh: Mesh = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    group: Group = 64,
    expert_cache_size: ExpertCacheSize = None,
    memory: Memory = None,
    simulate: Simulate = None,
    step: Step = None,
    fallback: Fallback = False,
    as_json: AsJson = False,
) -> None:
    """Measure reading a prompt and generating, apart."""
    choice = ModelChoice(
        model, mesh, dtype, quantize, memory, simulate, step, fallback, group, expert_cache_size
    )
    figures: dict[str, Any] = {"quantize": quantize}
    if text:
        # One model in memory at a time, so each is opened for itself.
        figures["perplexity"] = _evaluated(choice, text, window).perplexity
        if quantize:
            figures["perplexity_unquantised"] = _evaluated(
                dataclasses.replace(choice, quantize=None), text, window
            ).perplexity
    opened = choice.open()
    from moe_jax.generation.bench import bench as run_bench

    figures |= run_bench(
        opened.model,
        opened.model.session(batch),
        prompt=prompt,
        generated=generated,
        repeats=repeats,
    )
    if expert_cache_size is not None:
        figures |= opened.model.engine.expert_figures()
    figures |= {
        "load_seconds": opened.seconds,
        "compile_seconds": figures["compile_seconds"] + opened.compile_seconds,
    }
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    for name, value in figures.items():
        if not name.endswith("_by_layer"):
            print(f"{name:28} {_readable(name, value)}")


def _readable(name: str, value: Any) -> str:
    if "bytes" in name:
        return gibibytes(value) + ("/s" if name.endswith("per_second") else "")
    if name.startswith("share") or name.endswith("hit_rate"):
        return f"{value:.1%}"
    return f"{value:,.4g}" if isinstance(value, float) else "none" if value is None else str(value)


# Each command: its name, its function and the example that its help ends with.
COMMANDS: list[tuple[str, Callable[..., None], str]] = [
    ("generate", generate, 'moe-jax generate --model Qwen3-30B-A3B --prompt "def main("'),
    ("chat", chat, "moe-jax chat --model Qwen3-30B-A3B --mesh expert=4 --dtype bfloat16"),
    ("eval", evaluate, "moe-jax eval --model Qwen3-30B-A3B --text book.txt --quantize int8"),
    ("bench", bench, "moe-jax bench --model Qwen3-30B-A3B -p 512 -g 128 --json"),
]
