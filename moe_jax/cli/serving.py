"""The commands around a server: serve and bench-serve; `main.py` adds them to `moe-jax`."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_jax.cli.model_options import ModelChoice, ModelOptions, Opened, load_model
from moe_jax.cli.options import (
    AsJson,
    ModelArgument,
    ProcessFlags,
    option,
    path_option,
    spread,
)
from moe_jax.errors import UserError
from moe_jax.runtime.compile_cache import use_compile_cache
from moe_jax.runtime.distributed import is_first
from moe_jax.runtime.signals import noted_signals
from moe_jax.utils.progress import say
from moe_jax.utils.units import parse_bytes

if TYPE_CHECKING:
    from moe_jax.data.tokenizer import Tokenizer
    from moe_jax.models.serving_plan import ServingPlan
    from moe_jax.serving.engine_size import EngineSize
    from moe_jax.serving.run import OpenedModel

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LONGEST_BY_DEFAULT = 8192  # tokens of a request: memory for the cache is taken at the start


@dataclass(frozen=True)
class EngineOptions:
    """What an engine holds, and what it does with its experts; the same in all processes."""

    max_batch: Annotated[
        int, typer.Option("--max-batch", min=1, max=4096, metavar="N", help="Answers at a time.")
    ] = 32
    max_context: Annotated[
        int | None,
        option(
            "--max-context",
            min=2,
            metavar="N",
            help="Tokens of a prompt and its answer.  [default: the model's, at most 8192]",
        ),
    ] = None
    cache_tokens: Annotated[
        int | None,
        option(
            "--cache-tokens",
            min=1,
            metavar="N",
            help="Tokens in the cache, of all requests.  [default: --max-context for each]",
        ),
    ] = None
    balance_every: Annotated[
        int | None,
        option(
            "--balance-every",
            min=2,
            metavar="STEPS",
            help="Move experts to even the load of devices.  [default: they stay]",
        ),
    ] = None
    redundant_slots: Annotated[
        int,
        typer.Option(
            "--redundant-slots", min=0, metavar="N", help="Per device, for copies of busy experts."
        ),
    ] = 0

    def __post_init__(self) -> None:
        if self.redundant_slots and self.balance_every is None:
            raise UserError(
                f"--redundant-slots {self.redundant_slots} is for copies of busy experts, and "
                f"without --balance-every nothing says which they are: give both."
            )


@dataclass(frozen=True)
class ListenOptions:
    """Where a command listens, and to whom."""

    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Where to listen.")] = (
        "127.0.0.1"
    )
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, metavar="PORT", help="0: a free one.")
    ] = 8000
    api_key_file: Annotated[
        Path | None,
        path_option(
            "--api-key-file", metavar="FILE", help="Keys, one per line; a request needs one."
        ),
    ] = None

    def keys(self) -> list[bytes]:
        """Those that a request may have; none if nobody needs one."""
        from moe_jax.serving.keys import read_keys

        return [] if self.api_key_file is None else read_keys(self.api_key_file)


@contextmanager
def _with_extra(command: str) -> Iterator[None]:
    """While a command imports what the extra `serve` installs."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"moe-jax {command} needs {error.name}, which is not installed: pip install "
            f"'moe-jax[serve]'."
        ) from error


@spread
def serve(
    listen: ListenOptions,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", min=0, metavar="N", help="Answers that may wait.")
    ] = 128,
    request_timeout: Annotated[
        float,
        typer.Option("--request-timeout", min=0.001, metavar="S", help="Seconds of a request."),
    ] = 600.0,
    *,
    model: ModelArgument,
    options: ModelOptions,
    engine: EngineOptions,
    processes: ProcessFlags,
) -> None:
    """Serve a model to many at once, with OpenAI's API."""
    choice = ModelChoice(model.path, options)
    if options.mesh_config.data > 1:
        raise UserError(
            f"--mesh {options.mesh}: a server's mesh has no data axis; start a server per copy."
        )
    if engine.max_context is not None and options.context is not None:
        raise UserError("--context and --max-context say the same: give one of them.")
    engine = replace(engine, max_context=engine.max_context or options.context)
    with _with_extra("serve"):
        from moe_jax.serving.api.app import Api, Limits, create_app
        from moe_jax.serving.api.server import bound_socket
        from moe_jax.serving.run import run_server
    keys = listen.keys()
    processes.join(model=choice.fingerprint(), settings=repr((options, engine)))
    use_compile_cache()
    if not is_first():
        _follow(choice, engine)
        return
    if not keys and listen.host not in LOOPBACK:
        say(
            f"--host {listen.host} without --api-key-file: everybody who reaches it can use the "
            f"model."
        )
    with bound_socket(listen.host, listen.port) as listener:
        api = Api(Limits(engine.max_batch, max_waiting, request_seconds=request_timeout))
        app = create_app(api, keys=keys, log=say)
        run_server(api, app, listener, partial(_open, choice, engine))


def _load(
    choice: ModelChoice, engine: EngineOptions, checked: Callable[[], None]
) -> tuple[Opened, EngineSize]:
    """The model, and the size of its engine; `checked` is called when all that can be wrong has
    been looked at, before weights are read.
    """
    from moe_jax.serving.engine_size import EngineSize
    from moe_jax.serving.room import check_moves, check_room

    options, asked = choice.options, engine.max_context
    memory = None if options.memory is None else parse_bytes(options.memory)

    def sized(context: int) -> EngineSize:
        if asked is not None and asked > context:
            raise UserError(
                f"--max-context {asked} exceeds the model's context of {context} tokens: lower it."
            )
        context = asked or min(context, LONGEST_BY_DEFAULT)
        return EngineSize(
            engine.max_batch, context, engine.cache_tokens, balance_every=engine.balance_every
        )

    def check_plan(plan: ServingPlan, context: int) -> None:
        if engine.balance_every is not None:
            option = f"--balance-every {engine.balance_every}"
            check_moves(plan, option, options.expert_cache_size)
        check_room(plan, sized(context), memory, options.expert_cache_size)

    def check(tokenizer: Tokenizer, context: int) -> None:
        checked()

    whole = replace(choice, options=replace(options, context=None))
    opened = load_model(whole, check, check_plan, engine.redundant_slots)
    return opened, sized(opened.model.context)


def _open(choice: ModelChoice, options: EngineOptions, checked: Callable[[], None]) -> OpenedModel:
    """The model and its engine, ready to answer."""
    from moe_jax.serving.api.prompts import ServedModel
    from moe_jax.serving.engine import ServingEngine
    from moe_jax.serving.run import OpenedModel

    opened, size = _load(choice, options, checked)
    loaded = opened.model
    engine = ServingEngine(loaded, size)
    engine.start()
    # Training gives a run's model no start token.
    model = ServedModel(
        loaded.name, loaded.tokenizer, loaded.eos_ids, size.context, start_token=not choice.is_run
    )
    mesh = loaded.engine.plan.mesh
    devices = f"{mesh.size} {mesh.devices.flat[0].platform} device{'s' if mesh.size > 1 else ''}"
    return OpenedModel(
        model,
        engine,
        f"{loaded.name} in {loaded.held_in} on {devices}, loaded in {opened.seconds:,.1f} s; "
        f"{size.max_batch} slots of up to {size.context:,} tokens, "
        f"{(size.full_blocks - 1) * size.block:,} in all",
    )


def _follow(choice: ModelChoice, engine: EngineOptions) -> None:
    """What a process does that has no HTTP: the steps of process 0, until that one lets it go."""
    from moe_jax.serving.device_state import DeviceState
    from moe_jax.serving.lockstep import follow

    opened, size = _load(choice, engine, lambda: None)
    with noted_signals(signal.SIGTERM, signal.SIGINT):  # process 0 drains
        follow(DeviceState(opened.model, size))


@spread
def route(
    urls: Annotated[
        list[str],
        typer.Argument(
            metavar="URL ...", show_default=False, help="Servers, as http://127.0.0.1:8001."
        ),
    ],
    listen: ListenOptions,
) -> None:
    """One address for several servers of a model: requests go to those that answer."""
    with _with_extra("route"):
        from moe_jax.launch.router import Replica, ServerRouter, create_router
        from moe_jax.serving.api.app import Limits
        from moe_jax.serving.api.server import HttpServer, bound_socket
    from moe_jax.serving.load import ServerUnderLoad
    from moe_jax.serving.run import DRAIN_SECONDS

    router = ServerRouter([Replica(ServerUnderLoad(url).url) for url in urls])
    app = create_router(router, keys=listen.keys(), max_body=Limits().max_body, log=say)
    stop = threading.Event()
    with (
        bound_socket(listen.host, listen.port) as listener,
        noted_signals(signal.SIGTERM, signal.SIGINT, at_once=stop.set),
    ):
        server = HttpServer(app, listener)
        server.start()
        say(f"ready: {len(urls)} servers behind {server.address}; SIGTERM or Ctrl-C ends it")
        while not stop.wait(1):  # a wait without an end keeps signals out
            pass
        router.draining = True
        ends = time.monotonic() + DRAIN_SECONDS
        while router.open_requests and time.monotonic() < ends:
            time.sleep(0.05)
        server.stop()


def bench_serve(
    url: Annotated[
        str, typer.Argument(metavar="URL", show_default=False, help="As http://127.0.0.1:8000.")
    ],
    requests: Annotated[
        int, typer.Option("--requests", min=1, metavar="N", help="How many there are.")
    ] = 200,
    concurrency: Annotated[
        int, typer.Option("--concurrency", min=1, max=1024, metavar="N", help="Open at a time.")
    ] = 16,
    prompt_tokens: Annotated[
        int, typer.Option("--input", min=1, metavar="N", help="Tokens of each prompt.")
    ] = 512,
    answer_tokens: Annotated[
        int, typer.Option("--output", min=1, metavar="N", help="Tokens of each answer.")
    ] = 128,
    rate: Annotated[
        float | None,
        option(
            "--rate",
            min=0.001,
            metavar="R",
            help="Requests per second, at random times.  [default: as fast as answers come]",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the prompts.")] = 0,
    words: Annotated[
        bool, typer.Option("--words", help="Prompts of words, for servers without /tokenize.")
    ] = False,
    model: Annotated[
        str | None,
        option("--model", metavar="NAME", help="The model.  [default: the first one listed]"),
    ] = None,
    api_key_file: Annotated[
        Path | None, path_option("--api-key-file", metavar="FILE", help="The server's key.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a server: time to tokens, throughput, errors."""
    from moe_jax.serving.keys import read_keys
    from moe_jax.serving.load import RequestLoad, ServerUnderLoad, measure_server

    key = None if api_key_file is None else read_keys(api_key_file)[0].decode()
    load = RequestLoad(
        requests, concurrency, prompt_tokens, answer_tokens, rate, seed, words, model
    )

    def progress(done: int) -> None:
        if done % max(1, requests // 5) == 0:
            say(f"{done} of {requests} requests")

    figures = measure_server(ServerUnderLoad(url, key), load, progress)
    if as_json:
        print(json.dumps(figures, indent=2))
    else:
        _print(figures)


def _print(figures: dict[str, Any]) -> None:
    for name in ("first_token", "token", "request"):
        if spread := figures[f"{name}_seconds"]:
            values = "  ".join(f"{key} {value * 1e3:,.1f}" for key, value in spread.items())
            label = {"first_token": "time to first token", "token": "time per token"}.get(
                name, name
            )
            print(f"{label:20} {values} ms")
    for name, unit in (("generated_tokens", "tokens/s"), ("prompt_tokens", "tokens/s")):
        print(f"{name.replace('_', ' '):20} {figures[f'{name}_per_second']:,.1f} {unit}")
    print(f"{'requests':20} {figures['requests']} in {figures['seconds']:,.1f} s")
    for error, count in figures["errors"].items():
        print(f"{'errors':20} {count} x {error}")


COMMANDS: list[tuple[str, Callable[..., None], str]] = [
    ("serve", serve, "moe-jax serve Qwen/Qwen3-30B-A3B --mesh expert=4 --port 8000"),
    ("route", route, "moe-jax route http://127.0.0.1:8001 http://127.0.0.1:8002 --port 8000"),
    ("bench-serve", bench_serve, "moe-jax bench-serve http://127.0.0.1:8000 --concurrency 16"),
]
