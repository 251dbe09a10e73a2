"""The commands that run a model: generate, chat, eval and bench; `main.py` adds them to `moe-jax`.

Each reads its arguments, opens the model and calls one function of the package.
"""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_jax.cli.console import (
    explained_disk_errors,
    peak_memory,
    print_results,
    prompt_from_stdin,
    write_pieces,
)
from moe_jax.cli.model_options import ModelChoice, ModelOptions, Opened, load_model
from moe_jax.cli.options import (
    AsJson,
    MaxTokens,
    ModelArgument,
    ProcessFlags,
    ReplyFlags,
    SamplingFlags,
    System,
    Text,
    Window,
    option,
    path_option,
    spread,
)
from moe_jax.cli.reasoning import ReasoningWriter
from moe_jax.errors import UserError
from moe_jax.generation.streaming import EMPTY_PROMPT
from moe_jax.runtime.compile_cache import use_compile_cache
from moe_jax.runtime.distributed import broadcast_text, is_first
from moe_jax.runtime.signals import noted_signals, until_noted
from moe_jax.utils.progress import say
from moe_jax.utils.units import gibibytes

if TYPE_CHECKING:
    from moe_jax.data.tokenizer import Tokenizer
    from moe_jax.generation.evaluate import Evaluation
    from moe_jax.generation.sampling_options import SamplingOptions

STDOUT = Path("standard output")


@spread
def generate(
    prompt: Annotated[
        str, option("--prompt", metavar="TEXT", help="Text to continue; - reads it from stdin.")
    ],
    system_prompt: System = None,
    max_tokens: MaxTokens = 128,
    *,
    model: ModelArgument,
    flags: SamplingFlags,
    reply: ReplyFlags,
    options: ModelOptions,
    processes: ProcessFlags,
) -> None:
    """Continue a text with a model, on stdout; speeds on stderr."""
    if not prompt:
        raise UserError(EMPTY_PROMPT)
    choice = ModelChoice(model.path, options)
    sampling = flags.sampling()
    reply.require_template(system_prompt is not None)
    processes.join(model=choice.fingerprint(), settings=repr((options, sampling, max_tokens)))
    text = (prompt_from_stdin() if prompt == "-" else prompt) if is_first() else None
    text = broadcast_text("prompt", text)
    if not text:
        raise UserError(EMPTY_PROMPT)
    limits = {"max_tokens": max_tokens, "stop": flags.stop or []}
    with explained_disk_errors(STDOUT):
        _generate(choice, text, sampling, system_prompt, reply, limits)


def _generate(
    choice: ModelChoice,
    prompt: str,
    sampling: SamplingOptions,
    system: str | None,
    reply: ReplyFlags,
    limits: dict[str, Any],
) -> None:
    """Streams the text to stdout, then speeds and memory to stderr, also after Ctrl-C."""

    use_compile_cache()
    from moe_jax.generation.chat import chat_ids, first_messages, reply_pieces
    from moe_jax.generation.generate import Reader, check_length
    from moe_jax.generation.generate import generate as pieces
    from moe_jax.generation.sampling import Sampler
    from moe_jax.generation.stats import GenerationStats

    def tokens(tokenizer: Tokenizer) -> list[int]:
        if system is not None:
            question = {"role": "user", "content": prompt}
            return chat_ids(tokenizer, [*first_messages(system), question], reply.template())
        # Training gives a run's model no start token.
        return tokenizer.encode(prompt) if choice.is_run else tokenizer.encode_prompt(prompt)

    def check(tokenizer: Tokenizer, context: int) -> None:
        ids = tokens(tokenizer)
        if not choice.is_run:
            check_length(ids, context)

    opened = load_model(choice, check)
    loaded, stats, writer = opened.model, GenerationStats(), ReasoningWriter(reply.show_reasoning)
    speak = pieces if system is None else partial(reply_pieces, reasoning=writer)
    text = speak(
        loaded,
        Reader(loaded.session()),
        tokens(loaded.tokenizer),
        Sampler([sampling], loaded.tokenizer.num_ids),
        slide=choice.is_run,
        figures=stats,
        **limits,
    )
    if system is not None:
        say("--system-prompt: the prompt is put into the model's chat template, as in chat.")
    with noted_signals(signal.SIGINT) as interrupts:
        written = write_pieces(writer.around(until_noted(interrupts, text)))
    if not written.endswith("\n"):
        print(flush=True)
    say(stats.sentence(loaded.context))
    compiled = opened.compile_seconds + stats.compile_seconds
    say(
        f"{loaded.held_in}, loaded in {opened.seconds:,.1f} s, compiled in {compiled:,.1f} s; "
        f"{peak_memory()}"
    )
    _say_experts(choice, opened)
    if interrupts:
        raise typer.Exit(128 + signal.SIGINT)


def _say_experts(choice: ModelChoice, opened: Opened) -> None:
    """How often --expert-cache-size had an expert on the device."""
    asked = choice.options.expert_cache_size is not None
    counts = opened.model.engine.expert_counts if asked else None
    if counts is not None:
        say(
            f"experts: {counts.hit_rate:.1%} found on the device, "
            f"{gibibytes(counts.bytes_per_token)} fetched per token"
        )


@spread
def chat(
    system_prompt: System = None,
    max_tokens: MaxTokens = 1024,
    *,
    model: ModelArgument,
    flags: SamplingFlags,
    reply: ReplyFlags,
    options: ModelOptions,
    processes: ProcessFlags,
) -> None:
    """Talk with a model: /help, /reset, /quit; Ctrl-C stops a reply."""
    choice, sampling = ModelChoice(model.path, options), flags.sampling()
    processes.join(model=choice.fingerprint(), settings=repr((options, sampling, max_tokens)))
    use_compile_cache()
    from moe_jax.cli.chat import run_chat
    from moe_jax.generation.chat import Conversation, check_template

    template, writer = reply.template(), ReasoningWriter(reply.show_reasoning)
    opened = load_model(
        choice, lambda tokenizer, context: check_template(tokenizer, system_prompt, template)
    )
    loaded = opened.model
    conversation = Conversation(
        loaded,
        sampling,
        system=system_prompt,
        max_tokens=max_tokens,
        stop=flags.stop or [],
        template=template,
        reasoning=writer,
    )
    say(
        f"{loaded.name} in {loaded.held_in}, loaded in {opened.seconds:,.1f} s, context "
        f"{loaded.context:,} tokens"
    )
    with explained_disk_errors(STDOUT):
        run_chat(conversation, loaded.context, writer)
    say(peak_memory())
    _say_experts(choice, opened)


@spread
def evaluate(
    text: Text,
    window: Window = None,
    *,
    model: ModelArgument,
    options: ModelOptions,
    processes: ProcessFlags,
    as_json: AsJson = False,
) -> None:
    """Perplexity of a text: nats per token, bits per byte."""
    choice = ModelChoice(model.path, options)
    processes.join(model=choice.fingerprint(), settings=repr((options, window)))
    evaluation = _evaluated(choice, text, window)
    if as_json:
        results: dict[str, Any] = {
            "model": str(model.path),
            "text": str(text),
            "quantize": options.quantize,
            **evaluation._asdict(),
        }
        if evaluation.perplexity == float("inf"):  # which JSON cannot say
            results["perplexity"] = None
        print(json.dumps(results, indent=2))
        return
    print(f"perplexity      {evaluation.perplexity:,.4f}")
    print(f"nats per token  {evaluation.nats_per_token:.5f}")
    print(f"bits per byte   {evaluation.bits_per_byte:.5f}")
    rate = evaluation.tokens / evaluation.seconds
    print(f"{evaluation.tokens:,} tokens in windows of {evaluation.window:,}, {rate:,.1f} tokens/s")


def _evaluated(choice: ModelChoice, text: Path, window: int | None) -> Evaluation:
    """Opens the model and scores the text; the model leaves memory at the end."""
    use_compile_cache()
    from moe_jax.generation.evaluate import evaluate as score
    from moe_jax.generation.evaluate import read_text

    content = read_text(text)  # before anything is loaded
    opened = load_model(choice)
    # Training gives a run's model no start token.
    evaluation = score(opened.model, content, window, special=not choice.is_run)
    _say_experts(choice, opened)
    return evaluation


@spread
def bench(
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
        path_option("--text", metavar="FILE", help="With --quantize: perplexity on it, of both."),
    ] = None,
    window: Window = None,
    *,
    model: ModelArgument,
    options: ModelOptions,
    processes: ProcessFlags,
    as_json: AsJson = False,
) -> None:
    """Measure reading a prompt and generating, apart."""
    choice = ModelChoice(model.path, options)
    shape = prompt, generated, batch, repeats
    processes.join(model=choice.fingerprint(), settings=repr((options, shape, window)))
    use_compile_cache()
    from moe_jax.generation.bench import bench as measure

    results: dict[str, Any] = {"quantize": options.quantize}
    if text:
        # One model is in memory at a time: each is opened by itself.
        results["perplexity"] = _evaluated(choice, text, window).perplexity
        if options.quantize:
            plain = dataclasses.replace(choice, options=dataclasses.replace(options, quantize=None))
            results["perplexity_unquantised"] = _evaluated(plain, text, window).perplexity
    opened = load_model(choice)
    results |= measure(
        opened.model,
        opened.model.session(batch),
        prompt=prompt,
        generated=generated,
        repeats=repeats,
    )
    if options.expert_cache_size is not None:
        results |= opened.model.engine.expert_figures()
    results |= {
        "load_seconds": opened.seconds,
        "compile_seconds": results["compile_seconds"] + opened.compile_seconds,
    }
    print_results(results, as_json=as_json)


# Each command: its name, its function and the example that its help ends with.
COMMANDS: list[tuple[str, Callable[..., None], str]] = [
    ("generate", generate, 'moe-jax generate Qwen/Qwen3-30B-A3B --prompt "def main("'),
    ("chat", chat, "moe-jax chat Qwen/Qwen3-30B-A3B --mesh expert=4 --dtype bfloat16"),
    ("eval", evaluate, "moe-jax eval Qwen/Qwen3-30B-A3B --text book.txt --quantize int8"),
    ("bench", bench, "moe-jax bench Qwen/Qwen3-30B-A3B -p 512 -g 128 --json"),
]
