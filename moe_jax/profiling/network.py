"""What decoding sends between hosts, and how long that takes over some links: an estimate, made
before any host is there.

estimate = estimate_network(plan, batch=1)
estimate.messages, estimate.bytes_sent                 # of one step
estimate.links[0].tokens_per_second                    # over a link of 1 Gb/s

Every device is taken for a host of its own: `--mesh expert=2` over two hosts. Devices of one host
exchange faster than this says.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from moe_jax.models.layer_pattern import layer_kinds
from moe_jax.models.serving_plan import ServingPlan
from moe_jax.parallel.sharding import named
from moe_jax.profiling.memory import per_device

GLOO_SECONDS = 120e-6
"""What a small message takes without a network: Gloo, XLA:CPU and TCP at both ends. Measured
between two network namespaces of one machine with jax 0.10.1, best of 8 while it was busy: 105
to 150 us per gather, 230 to 300 us per sum, which is two messages (docs/log.md)."""

MEMORY_BANDWIDTH = 100e9
"""Bytes per second at which a device is taken to read its weights: a laptop of 2024 (Apple's
figure for its M3, and 120 GB/s for its M4; two channels of DDR5-6400 have 102 GB/s)."""


class Link(NamedTuple):
    """What connects two hosts."""

    name: str
    bytes_per_second: float  # that a host sends while it receives as many
    message_seconds: float  # from one program to another

    def seconds(self, cost: Cost) -> float:
        """The time of one step's exchanges."""
        return cost.messages * self.message_seconds + cost.bytes_sent / self.bytes_per_second


LINKS = (
    # 94.9% of Ethernet's bits are payload of TCP in frames of 1,500 bytes. On the way through one
    # switch and two drivers a packet takes about half of what ping shows: 0.1 and 0.04 ms.
    Link("1 Gb/s Ethernet", 0.949e9 / 8, GLOO_SECONDS + 50e-6),
    Link("10 Gb/s Ethernet", 9.49e9 / 8, GLOO_SECONDS + 20e-6),
    # TCP over Thunderbolt: 300 us between two Macs (J. Geerling, "1.5 TB of VRAM on Mac Studio",
    # 2025, where RDMA, which Gloo does not use, takes less than 50), and about 16 of its 40 Gb/s.
    Link("Thunderbolt 4", 16e9 / 8, 300e-6),
)


class Exchanges(NamedTuple):
    """Those of one kind in a step; Gloo sends them around a ring of `ranks` devices."""

    kind: Literal["sum", "gather"]
    ranks: int
    bytes: int  # of a sum: what is added up; of a gather: the part of one device
    times: int  # per step


class Cost(NamedTuple):
    """What the exchanges of a step come to."""

    messages: int  # each waits for the one before
    bytes_sent: int  # by each device, which receives as many


def step_cost(exchanges: list[Exchanges]) -> Cost:
    """A ring passes a gather's parts on ranks - 1 times. It does so twice for a sum, with parts of
    1 / ranks of it: first they are added up, then spread.
    """
    messages, sent = 0, 0.0
    for kind, ranks, size, times in exchanges:
        turns = (ranks - 1) * (2 if kind == "sum" else 1)
        messages += times * turns
        sent += times * turns * (size / ranks if kind == "sum" else size)
    return Cost(messages, round(sent))


def decode_exchanges(plan: ServingPlan, rows: int) -> list[Exchanges]:
    """The exchanges of a step that decodes one token of each of `rows` rows, which are those of
    one position on `data`; nothing is exchanged over `data`.
    """
    model, item = plan.model, plan.dtype.itemsize
    width = rows * model.width * item
    kinds = layer_kinds(model, plan.moe)
    experts = sum(kind.moe for kind in kinds)
    norms = 2 * len(kinds) if model.qk_norm and model.qk_norm_over == "width" else 0

    def ranks(axes: tuple[str, ...]) -> int:
        return math.prod(plan.mesh.shape[axis] for axis in axes)

    heads, hidden, vocab = (ranks(plan.rules[dim]) for dim in ("heads", "hidden", "vocab"))
    found = [
        Exchanges("gather", vocab, width, 1),  # embeddings
        Exchanges("sum", heads, rows * 4, norms),  # of queries and of keys
        Exchanges("sum", heads, width, len(kinds)),  # attention
        Exchanges("sum", ranks(("expert", "tensor")), width, experts),
        Exchanges("sum", hidden, width, len(kinds) - experts),  # dense feed-forward
        Exchanges("gather", vocab, rows * plan.vocab_size // vocab * 4, 1),  # logits, f32
    ]
    return [one for one in found if one.ranks > 1 and one.times]


class LinkEstimate(NamedTuple):
    """Decoding over hosts that one link connects."""

    link: str
    exchange_seconds: float  # of a step
    tokens_per_second_at_most: float  # if computing took no time
    tokens_per_second: float  # if computing took as long as reading the weights


class NetworkEstimate(NamedTuple):
    """Decoding over hosts with one device each: an estimate."""

    rows: int  # sequences that a device sees, each of which gets a token per step
    messages: int  # of a step, one after another
    bytes_sent: int  # of a step, by each device
    weight_bytes: int  # of a step, that each device reads
    memory_bandwidth: float  # assumed, bytes/s
    links: tuple[LinkEstimate, ...]


def estimate_network(plan: ServingPlan, batch: int) -> NetworkEstimate | None:
    """Decoding of `batch` sequences at a time; None where nothing is exchanged. With several
    sequences, even and independent choices of experts are assumed.
    """
    rows = -(-batch // plan.mesh.shape["data"])
    exchanges = decode_exchanges(plan, rows)
    if not exchanges:
        return None
    cost = step_cost(exchanges)
    read = round(
        sum(
            per_device(weight.abstract(), named(plan.mesh, weight.held_spec()))
            * plan.read_part(path, rows)
            for path, weight in plan.weights.items()
        )
    )

    def over(link: Link) -> LinkEstimate:
        exchange = link.seconds(cost)
        step = exchange + read / MEMORY_BANDWIDTH
        return LinkEstimate(link.name, exchange, batch / exchange, batch / step)

    links = tuple(over(link) for link in LINKS)
    return NetworkEstimate(rows, *cost, read, MEMORY_BANDWIDTH, links)
