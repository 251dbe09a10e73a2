"""The serving engine over a small model: every request against the same one alone, and against
`generate`.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.generation.generate import Reader
from moe_jax.generation.sampling import Sampler
from moe_jax.generation.sampling_options import SamplingOptions
from moe_jax.inference.session import LoadedModel
from moe_jax.serving import lockstep
from moe_jax.serving.device_state import DeviceState
from moe_jax.serving.engine import ServingEngine
from moe_jax.serving.engine_size import EngineSize
from moe_jax.serving.request import Finished, Request, Token
from moe_jax.serving.stream import TokenStream
from moe_jax.serving.warm_up import warm_up
from tests.support.small_models import VOCAB, case, load

GREEDY = SamplingOptions(temperature=0)
SIZE = EngineSize(max_batch=32, context=64, chunk=16, block=16)
SMALL = EngineSize(max_batch=3, context=64, cache_tokens=128, chunk=16, block=16)
SECONDS = 120


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load(case("experts"), {})


@pytest.fixture(scope="module")
def engine(loaded: LoadedModel) -> Iterator[ServingEngine]:
    engine = ServingEngine(loaded, SIZE)
    engine.start()
    yield engine
    assert engine.drain(SECONDS)
    assert engine.stats().compilations == 0


def prompt(seed: int, length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, VOCAB - 1, length).tolist())


def request(seed: int, length: int = 20, tokens: int = 12, **options: Any) -> Request:
    options = {"sampling": GREEDY, "ignore_eos": True} | options
    return Request(prompt(seed, length), tokens, **options)


def read(stream: TokenStream) -> tuple[list[int], str]:
    """The tokens of a stream and how it ended."""
    *tokens, end = list(stream)
    assert isinstance(end, Finished) and all(isinstance(token, Token) for token in tokens), end
    return [token.id for token in tokens], end.reason


def say(engine: ServingEngine, one: Request) -> list[int]:
    return read(engine.submit(one))[0]


def generated(loaded: LoadedModel, one: Request) -> list[int]:
    """What `moe-jax generate` draws."""
    reader, sampler = Reader(loaded.session()), Sampler([one.sampling], VOCAB)
    sampler.begin(one.prompt)
    tokens = [int(sampler.draw(reader.read(one.prompt)[0])[0])]
    while len(tokens) < one.max_tokens:
        tokens.append(int(sampler.draw(reader.append(tokens[-1]))[0]))
    return tokens


def of_many_kinds() -> list[Request]:
    """32 requests: greedy and sampled, short and long, with and without adjustments."""
    kinds: list[dict[str, Any]] = [
        {},
        {"sampling": SamplingOptions(temperature=1.0, seed=2**63)},
        {"sampling": SamplingOptions(temperature=0.9, top_p=0.8, min_p=0.02, seed=3)},
        {"sampling": SamplingOptions(temperature=2.0, top_k=5, repetition_penalty=1.3, seed=4)},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"logit_bias": {3: 5.0, 4: -100.0}, "sampling": SamplingOptions(1.5, seed=5)},
    ]
    return [
        request(seed, 1 + 7 * seed % 50, 4 + seed % 11, **kinds[seed % len(kinds)])
        for seed in range(32)
    ]


def test_a_request_among_31_others_says_what_it_says_alone(engine: ServingEngine) -> None:
    requests = of_many_kinds()
    streams = [engine.submit(one) for one in requests]
    together = [read(stream)[0] for stream in streams]
    assert [len(tokens) for tokens in together] == [one.max_tokens for one in requests]
    assert together == [say(engine, one) for one in requests]
    assert len({tuple(tokens) for tokens in together}) == len(requests)
    assert engine.stats().compilations == 0


def test_it_says_what_generate_says(engine: ServingEngine, loaded: LoadedModel) -> None:
    comparable = [one for one in of_many_kinds() if not one.logit_bias and not one.presence_penalty]
    for one in comparable[:4]:
        assert say(engine, one) == generated(loaded, one), one


def test_what_was_kept_of_a_prompt_changes_nothing(loaded: LoadedModel) -> None:
    engine = ServingEngine(loaded, SMALL)
    engine.start()
    long = prompt(70, 50)
    other = (*long[:37], *prompt(71, 9))
    before = engine.stats()
    first = say(engine, Request(long, 8, sampling=GREEDY, ignore_eos=True))
    assert engine.stats().prefix_hit_tokens == before.prefix_hit_tokens
    again = say(engine, Request(long, 8, sampling=GREEDY, ignore_eos=True))
    assert again == first
    assert engine.stats().prefix_hit_tokens == before.prefix_hit_tokens + 48
    shared = say(engine, Request(other, 8, sampling=GREEDY, ignore_eos=True))
    assert engine.stats().prefix_hit_tokens == before.prefix_hit_tokens + 48 + 32
    for seed in range(80, 84):  # 16 blocks: those of before have to go
        say(engine, request(seed, 50, 1))
    found = engine.stats().prefix_hit_tokens
    assert say(engine, Request(other, 8, sampling=GREEDY, ignore_eos=True)) == shared
    assert engine.stats().prefix_hit_tokens == found
    assert engine.drain(SECONDS) and engine.stats().compilations == 0


class Rising:
    """Allows the tokens that are higher than the last one."""

    def __init__(self) -> None:
        self.last = -1

    def allowed(self) -> np.ndarray:
        return np.arange(VOCAB) > self.last

    def accept(self, token: int) -> None:
        assert token > self.last
        self.last = token


def test_where_the_cache_is_full_the_youngest_wait_and_nobody_sees_it(
    engine: ServingEngine, loaded: LoadedModel
) -> None:
    """Eight blocks for three rows that need four each in the end."""
    small = ServingEngine(loaded, SMALL)
    small.start()
    requests = [one for one in of_many_kinds() if len(one.prompt) < 14][:6]
    requests = [dataclasses.replace(one, max_tokens=45) for one in requests]
    rising = [request(50, 3, 40, token_filter=Rising(), sampling=SamplingOptions(2.0, seed=6))]
    streams = [small.submit(one) for one in (*requests, *rising)]
    assert small.drain(SECONDS)
    found = [read(stream) for stream in streams]
    assert small.stats().preemptions > 1 and small.stats().compilations == 0
    assert small.stats().cache_use == 0
    assert [tokens for tokens, _ in found[:-1]] == [say(engine, one) for one in requests]
    again = [dataclasses.replace(one, token_filter=Rising()) for one in rising]
    assert found[-1] == read(engine.submit(again[0]))


def test_layers_with_a_window_keep_what_they_see(loaded: LoadedModel) -> None:
    """A model with a window of 3 tokens in every other layer: a row has two blocks for these."""
    windowed = load(case("biases"), {})
    size = EngineSize(max_batch=2, context=64, cache_tokens=256, chunk=32, block=16)
    engine = ServingEngine(windowed, size)
    state: Any = engine._state
    assert [len(layer.keys[0]) for layer in state._cache[0]] == [1 + 2 * 2 * 2 + 2, 1 + 16]
    engine.start()
    long = request(1, 39, 20)
    shared = Request((*long.prompt[:35], 1, 2), 9, sampling=GREEDY, ignore_eos=True)
    requests = [long, request(2, 35, 29), request(3, 40, 2), shared]
    streams = [engine.submit(one) for one in requests]
    assert engine.drain(SECONDS) and engine.stats().compilations == 0
    assert engine.stats().prefix_hit_tokens == 32
    for one, stream in zip(requests, streams, strict=True):
        assert read(stream)[0] == generated(windowed, one)


def test_end_tokens_and_limits(engine: ServingEngine) -> None:
    for seed in range(90, 130):
        tokens = say(engine, request(seed))
        new = [i for i in range(2, 12) if tokens[i] not in tokens[:i]]
        if new:
            break
    after = new[0]
    ended = request(seed, stop_token_ids=(tokens[after],))
    assert read(engine.submit(ended)) == (tokens[:after], "stop")
    longer = request(seed, stop_token_ids=(tokens[after],), min_tokens=12)
    found, reason = read(engine.submit(longer))
    assert found[:after] == tokens[:after] and tokens[after] not in found and reason == "length"
    forced = request(seed, ignore_eos=False, logit_bias={VOCAB - 1: 1000.0})
    assert read(engine.submit(forced)) == ([], "stop")
    # 60 places of the prompt, 4 of what is drawn, and the last token, which is never read.
    full = read(engine.submit(request(91, 60, 1000)))
    assert full == (say(engine, request(91, 60, 5)), "length")


def test_log_probabilities_are_the_models_own(engine: ServingEngine, loaded: LoadedModel) -> None:
    one = request(95, logprobs=3, tokens=3, frequency_penalty=1.0)
    stream = engine.submit(one)
    engine.submit(request(96, sampling=SamplingOptions(1.0)))
    *tokens, _ = list(stream)
    session, new = loaded.session(), list(one.prompt)
    for token in tokens:
        assert isinstance(token, Token) and token.logprob is not None
        logits_V = session.logits([new])[0].astype(np.float64)
        log_V = logits_V - np.log(np.exp(logits_V).sum())
        best = np.argsort(-log_V)[:3]
        assert [id for id, _ in token.top] == best.tolist()
        np.testing.assert_allclose([log for _, log in token.top], log_V[best], atol=1e-4)
        np.testing.assert_allclose(token.logprob, log_V[token.id], atol=1e-4)
        new = [token.id]
    assert all(event.top == () for event in engine.submit(request(95, tokens=2)) if event[0] == 0)


def test_every_choice_of_an_expert_is_counted(engine: ServingEngine, loaded: LoadedModel) -> None:
    """Of prompt and answer, not of padding and of free slots."""
    plan = loaded.engine.plan
    deadline = time.monotonic() + SECONDS

    def counts(wanted: int) -> np.ndarray:
        while True:
            found = engine.stats().expert_counts
            assert found is not None and time.monotonic() < deadline
            if found[0].sum() == wanted:
                return found
            time.sleep(0.005)

    ServingEngine(loaded, SMALL)  # of one model there is one count: it begins here
    say(engine, request(60, 20, 1))
    alone = counts(20 * plan.moe.top_k)
    assert alone.shape == (2, plan.moe.num_experts)
    say(engine, request(60, 20, 5))  # 16 of the prompt's tokens are there already
    both = counts((20 + 4 + 4) * plan.moe.top_k)
    assert (both >= alone).all() and (both.sum(1) == both[0].sum()).all()


class Counting:
    """Allows one token at a time: 1, 2, 3 and so on; fails at 4."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def allowed(self) -> np.ndarray:
        return np.arange(VOCAB) == len(self.tokens) + 1

    def accept(self, token: int) -> None:
        self.tokens.append(token)
        if token == 4:
            raise ValueError("no more")


def test_a_token_filter_decides_and_its_failure_ends_its_request_alone(
    engine: ServingEngine,
) -> None:
    beside = engine.submit(request(98))
    filtered = engine.submit(request(97, token_filter=Counting()))
    *tokens, end = list(filtered)
    assert [token[0] for token in tokens] == [1, 2, 3]
    assert isinstance(end, Finished) and end.reason == "error" and "no more" in end.message
    assert read(beside) == (say(engine, request(98)), "length")


def test_a_cancelled_request_makes_room(engine: ServingEngine) -> None:
    gone = [engine.submit(request(seed, tokens=40)) for seed in range(33)]
    last = engine.submit(request(33, tokens=2))
    for stream in gone:
        stream.cancel()
    assert read(last) == (say(engine, request(33, tokens=2)), "length")
    assert all(list(stream)[-1] == Finished("cancelled") for stream in gone)
    assert engine.stats().running == engine.stats().waiting == 0


def test_what_cannot_be_is_refused(engine: ServingEngine, loaded: LoadedModel) -> None:
    for wrong, message in (
        (request(0, 65), "65 tokens and the server's context 64"),
        (request(0, 0), "prompt is empty"),
        (Request((VOCAB,), 1), f"token {VOCAB}"),
        (Request((-1,), 1), "token -1"),
        (request(0, tokens=0), "max_tokens 0"),
    ):
        with pytest.raises(UserError, match=message):
            engine.submit(wrong)
    with pytest.raises(UserError, match="--max-context 65 exceeds the context of 64 tokens"):
        ServingEngine(loaded, EngineSize(2, 65))
    with pytest.raises(UserError, match="--max-batch 0"):
        EngineSize(0, 8)


@pytest.mark.slow
def test_over_a_mesh_it_says_the_same(engine: ServingEngine) -> None:
    """Quicker tests: the same programs on meshes in tests/inference/test_engine.py."""
    over = ServingEngine(load(case("experts"), {"expert": 2, "tensor": 2}), SMALL)
    over.start()
    requests = of_many_kinds()[:6]
    streams = [over.submit(one) for one in requests]
    assert over.drain(SECONDS)
    assert [read(stream)[0] for stream in streams] == [say(engine, one) for one in requests]
    assert over.stats().compilations == 0


def test_requests_are_taken_in_order_and_drained(loaded: LoadedModel) -> None:
    """Three slots, so that most requests take one that another has left."""
    engine = ServingEngine(loaded, SMALL)
    order: list[int] = []
    lock = threading.Lock()

    def news(number: int) -> None:
        with lock:
            if number not in order:
                order.append(number)

    engine.start()
    requests = [request(100 + number, 1 + number % 40, 3 + number % 5) for number in range(12)]
    streams = [
        engine.submit(one, lambda number=number: news(number))
        for number, one in enumerate(requests)
    ]
    assert engine.drain(SECONDS)
    assert order == list(range(12))
    found = [stream.take() for stream in streams]
    assert [len(events) - 1 for events in found] == [one.max_tokens for one in requests]
    assert all(events[-1] == Finished("length") for events in found)
    assert engine.stats().compilations == 0 and engine.stats().stalled_seconds == 0
    with pytest.raises(UserError, match="stopped"):
        engine.submit(requests[0])
    again = ServingEngine(loaded, SMALL)
    again.start()
    for one, events in zip(requests, found, strict=True):
        assert say(again, one) == [event[0] for event in events[:-1]]
    endless = again.submit(request(0, tokens=60))
    again.stop()
    assert list(endless)[-1] in (Finished("error", "The server was stopped."), Finished("length"))


def test_a_step_over_few_slots_is_used_where_it_gives_the_same_bits(loaded: LoadedModel) -> None:
    engine = ServingEngine(loaded, SMALL)
    state: Any = engine._state
    decode, row_logits, slots = state.decode, state.row_logits, [0]
    state.decode = lambda *a: (slots.append(len(a[0])), decode(*a))
    assert warm_up(state) == (2, 3)
    state.row_logits = lambda row: row_logits(row) * np.float32(1 + 1e-6 * (slots[-1] == 2))
    assert warm_up(state) == (3,)
    state.row_logits = row_logits
    engine.start()
    slots.clear()
    list(engine.submit(request(1, tokens=5)))
    assert slots == 4 * [2]
    streams = [engine.submit(request(number, tokens=20)) for number in range(3)]
    assert engine.drain(SECONDS)
    assert all(len(stream.take()) == 21 for stream in streams) and 3 in slots


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failure_ends_all_streams_and_is_told(loaded: LoadedModel) -> None:
    engine = ServingEngine(loaded, SMALL)
    engine.start()
    state: Any = engine._state

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    assert engine.failed is None
    state.decode = fail
    streams = [engine.submit(request(number, tokens=30)) for number in range(5)]
    ends = [list(stream)[-1] for stream in streams]
    assert {end.reason for end in ends if isinstance(end, Finished)} == {"error"}
    assert engine.failed is not None and "RuntimeError: out of memory" in engine.failed
    assert not any(isinstance(end, Token) or "out of memory" not in end.message for end in ends)
    with pytest.raises(UserError, match="out of memory"):
        engine.submit(request(0))
    assert engine.drain(SECONDS)


def test_no_stream_waits_longer_than_a_chunk(loaded: LoadedModel) -> None:
    """Between two tokens of a running stream, one chunk of a long prompt is read at most."""
    engine = ServingEngine(loaded, SMALL)
    calls: list[str] = []
    state: Any = engine._state
    read_prompt, draw = state.read_prompt, state.draw
    state.read_prompt = lambda *a: (calls.append("chunk"), read_prompt(*a))
    state.draw = lambda *a: (calls.append("draw"), draw(*a))[1]
    engine.start()
    calls.clear()
    running = engine.submit(request(1, 4, 30))
    while engine.stats().generation_tokens == 0:
        time.sleep(0.001)
    list(engine.submit(request(2, 60, 2)))
    list(running)
    assert engine.drain(SECONDS)
    text = " ".join(calls)
    assert text.count("chunk") == 5 and "chunk chunk" not in text


def test_a_follower_holds_what_the_first_process_holds(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both in this process: what is told to the other is kept, and done afterwards."""
    told: list[str] = []
    monkeypatch.setattr(lockstep, "process_count", lambda: 2)
    monkeypatch.setattr(lockstep, "tell_processes", lambda what, text, forget: told.append(text))
    engine = ServingEngine(loaded, SMALL)
    engine.start()
    options = SamplingOptions(1.0, top_p=0.9, seed=5)
    tokens = tuple(range(20))
    streams = [
        engine.submit(Request(tokens, 6, sampling=options, frequency_penalty=1.0, logprobs=2)),
        engine.submit(Request(tokens[:18], 4, logit_bias={3: 1.0}, min_tokens=3)),
        engine.submit(Request(tokens[:17], 3)),
    ]
    assert engine.drain(120)
    engine.dismiss()
    assert sum(len(stream.take()) for stream in streams) > 3
    monkeypatch.setattr(lockstep, "hear_process", lambda *_: told.pop(0))
    other = DeviceState(loaded, SMALL)
    lockstep.follow(other)
    assert not told
    for first, second in zip(*map(_arrays, (engine._state._state, other)), strict=True):
        np.testing.assert_array_equal(first, second)


def _arrays(state: DeviceState) -> list[np.ndarray]:
    kept = (state._cache, state._tables, state._logits_SV, state.sampler._adjustments)
    return [np.asarray(array) for array in jax.tree.leaves(kept)]
