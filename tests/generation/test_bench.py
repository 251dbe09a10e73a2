"""What is timed: compiling never counts as speed, and the figures of a benchmark fit together."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import pytest

from moe_jax.errors import UserError
from moe_jax.generation import bench
from moe_jax.profiling.clock import COMPILING, CompileClock, Stopwatch
from moe_jax.profiling.machine import read_bandwidth
from tests.support.fake_model import Loaded, fake_engine


def test_compiling_does_not_count_as_speed() -> None:
    def chain(x: jax.Array) -> jax.Array:
        for i in range(150):
            x = jnp.sin(jax.jit(lambda y, i=i: y * i)(x))  # traces within a trace
        return x

    step = jax.jit(chain)
    x = jnp.ones(10)
    start = time.perf_counter()
    with Stopwatch() as first:
        step(x).block_until_ready()
    elapsed = time.perf_counter() - start
    with Stopwatch() as second:
        step(x).block_until_ready()
    assert first.compiling > 0.5 * elapsed and first.seconds < 0.5 * elapsed
    assert first.compiling + first.seconds <= elapsed
    assert second.compiling == 0 and 0 < second.seconds < first.compiling


def test_spans_within_spans_count_once() -> None:
    clock, note = CompileClock(), jax.monitoring.record_event_duration_secs
    time.sleep(0.05)
    before = time.perf_counter()
    note("/jax/another", 9.0)
    note(COMPILING + "inner", 0.01)
    time.sleep(0.02)
    note(COMPILING + "second_inner", 0.01)
    note(COMPILING + "outer", time.perf_counter() - before + 0.03)
    assert clock.seconds == pytest.approx(time.perf_counter() - before + 0.03, abs=0.01)


def test_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fake_engine(decode_bytes=lambda batch: batch * 1000)
    loaded = Loaded(lambda tokens: 65, engine=engine)
    monkeypatch.setattr(bench, "read_bandwidth", lambda devices: 1e6 * devices)
    found = bench.bench(loaded, loaded.session(2), prompt=12, generated=5, repeats=3)
    assert [len(feed) for feed in loaded.feeds[::2]] == [12, 1, 1, 1, 1, 1, 12, 1] + [
        12,
        1,
        1,
        1,
        1,
        1,
    ] * 3  # the warm-up, then repeats
    assert all(0 <= token < 256 for feed in loaded.feeds for token in feed)
    assert found["prefill_tokens_per_second"] == pytest.approx(24 / found["prefill_seconds"])
    assert found["decode_tokens_per_second"] == pytest.approx(2000 / found["decode_ms_per_step"])
    assert found["decode_bytes_per_step"] == 2000 and found["floor_ms_per_step"] == pytest.approx(
        2.0
    )
    assert found["share_of_floor"] == pytest.approx(2.0 / found["decode_ms_per_step"])
    assert (
        found["first_token_seconds"] >= found["prefill_seconds"] > 0 and found["peak_bytes"] > 2**20
    )
    with pytest.raises(
        UserError, match="-p 199 and -g 2 make 201 tokens and the model's context is 200"
    ):
        bench.bench(loaded, loaded.session(), prompt=199, generated=2)


def test_read_bandwidth_is_plausible() -> None:
    assert 1e8 < read_bandwidth(size=2**24, repeats=3) < 1e14
