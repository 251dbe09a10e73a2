"""What a server tells Prometheus: the names are vLLM's where the meaning is the same; what is known
of the experts has this package's.

The number of series does not grow with the model: layers are told in at most 8 groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from moe_jax.placement.cost import max_over_mean
from moe_jax.serving.request import EngineStats, ExpertStats
from moe_jax.utils.units import ranges

LAYER_GROUPS = 8
_LONG = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)
_SHORT = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5, 1, 2, 5)


class ServerMetrics:
    """Counts what requests do, and asks the engine for its own figures at each scrape."""

    def __init__(self, model: str, stats: Callable[[], Any]):
        """`stats()` gives the engine's figures; None while it loads."""
        self._registry = CollectorRegistry(auto_describe=False)
        collector: Any = EngineCollector(model, stats)
        self._registry.register(collector)
        ProcessCollector(registry=self._registry)
        self._model = model
        self._first = self._histogram("time_to_first_token_seconds", "Arrival to token.", _LONG)
        self._next = self._histogram("inter_token_latency_seconds", "Token to token.", _SHORT)
        self._whole = self._histogram("e2e_request_latency_seconds", "Arrival to end.", _LONG)
        self._queue = self._histogram("request_queue_time_seconds", "Arrival to prefill.", _LONG)
        self._prompt = self._counter("prompt_tokens", "Prompt tokens of ended answers.")
        self._written = self._counter("generation_tokens", "Tokens generated.")
        self._success = Counter(
            "vllm:request_success",
            "Ended answers by reason.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._refused = Counter(
            "moe_jax:request_errors",
            "Requests that got no answer, by status.",
            ["model_name", "status"],
            registry=self._registry,
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Any:
        return Histogram(
            f"vllm:{name}", text, ["model_name"], registry=self._registry, buckets=buckets
        ).labels(self._model)

    def _counter(self, name: str, text: str) -> Any:
        counter = Counter(f"vllm:{name}", text, ["model_name"], registry=self._registry)
        return counter.labels(self._model)

    def first_token(self, seconds: float) -> None:
        """The first token of an answer came so long after its request."""
        self._first.observe(seconds)
        self._written.inc()

    def next_token(self, seconds: float) -> None:
        """A further token came so long after the one before."""
        self._next.observe(seconds)
        self._written.inc()

    def queued(self, seconds: float) -> None:
        """A request waited so long for its first step."""
        self._queue.observe(seconds)

    def finished(self, reason: str, prompt_tokens: int, seconds: float) -> None:
        """An answer ended."""
        self._whole.observe(seconds)
        self._prompt.inc(prompt_tokens)
        self._success.labels(self._model, reason).inc()

    def refused(self, status: int) -> None:
        """A request got an error."""
        self._refused.labels(self._model, str(status)).inc()

    def text(self) -> bytes:
        """What a scrape gets."""
        return generate_latest(self._registry)


class EngineCollector:
    """The engine's figures at the time of a scrape: a collector, as prometheus-client calls it."""

    def __init__(self, model: str, stats: Callable[[], EngineStats | None]):
        self._model, self._stats = model, stats

    def collect(self) -> Iterator[Metric]:
        """Nothing while the model loads."""
        stats = self._stats()
        if stats is None:
            return
        for name, text, value in (
            ("vllm:num_requests_running", "Answers being generated.", stats.running),
            ("vllm:num_requests_waiting", "Answers that wait for a slot.", stats.waiting),
            ("vllm:kv_cache_usage_perc", "Share of the cache in use, 0 to 1.", stats.cache_use),
        ):
            yield self._gauge(name, text, value)
        for name, text, count in (
            ("vllm:prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_query_tokens),
            ("vllm:prefix_cache_hits", "Prompt tokens found.", stats.prefix_hit_tokens),
            ("vllm:num_preemptions", "Times that the cache had no room.", stats.preemptions),
            ("moe_jax:expert_cache_hits", "Experts found there.", stats.expert_cache_hits),
            ("moe_jax:expert_cache_misses", "Experts fetched.", stats.expert_cache_misses),
            ("moe_jax:compilations", "Programs compiled since start.", stats.compilations),
        ):
            if count is not None:
                yield self._counter(name, text, count)
        if stats.expert_counts is not None:
            yield from self._experts(stats.expert_counts)
        if stats.experts is not None:
            yield from self._moves(stats.experts)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _experts(self, counts_LE: np.ndarray) -> Iterator[Metric]:
        yield self._by_layers(
            "moe_jax:expert_load_max_over_mean",
            "Load of the fullest expert over the mean, largest of the layers.",
            counts_LE,
            lambda counts: float(max_over_mean(counts).max()),
        )
        yield self._by_layers(
            "moe_jax:expert_dead_experts",
            "Experts without a token, of all the layers.",
            counts_LE,
            lambda counts: int((counts == 0).sum()),
        )

    def _moves(self, experts: ExpertStats) -> Iterator[Metric]:
        if experts.device_choices is not None:
            yield self._by_layers(
                "moe_jax:device_load_max_over_mean",
                "Choices on the fullest device over the mean since experts last moved, largest of "
                "the layers.",
                experts.device_choices,
                lambda counts: float(max_over_mean(counts).max()),
            )
        for name, text, value in (
            ("moe_jax:expert_moves", "Slots that got another expert.", experts.moves),
            ("moe_jax:expert_move_pauses", "Waits for a part of a move.", experts.pauses),
            ("moe_jax:expert_move_seconds", "All these waits.", experts.pause_seconds),
        ):
            yield self._counter(name, text, value)
        yield self._gauge(
            "moe_jax:expert_move_longest_seconds", "The longest of them.", experts.longest_pause
        )

    def _by_layers(
        self, name: str, text: str, counts: np.ndarray, value: Callable[[np.ndarray], float]
    ) -> Metric:
        """A gauge with a value for each group of layers that has any load."""
        family = GaugeMetricFamily(name, text, labels=["model_name", "layers"])
        groups = max(1, min(LAYER_GROUPS, len(counts)))
        for layers in np.array_split(np.arange(len(counts)), groups):
            if counts[layers].sum():
                label = ranges([int(layer) for layer in layers])
                family.add_metric([self._model, label], value(counts[layers]))
        return family
