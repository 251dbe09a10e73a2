"""What replanning is worth: a skewed corpus before and after experts move, predicted and realised,
in one run.

`scripts/benchmark.py placement` prints it. Tables take turns (experts migrate between them), so
that a machine whose speed drifts treats all alike: `contiguous`; `packed`, experts in order of
their load, the worst there is; and `planned`, by the load that the first steps under `contiguous`
measured. Predictions replay the traffic of further steps, which the plan has not seen, one by one
through the planned table before it is used; every table is then measured on batches of its own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax.benchmarks.training import Results, build, one_document
from moe_jax.config.schema import MeshConfig
from moe_jax.errors import UserError
from moe_jax.moe.dispatch import pool_capacity
from moe_jax.placement.cost import max_over_mean, planned_traffic
from moe_jax.placement.plan import plan_placement
from moe_jax.placement.table import Placement, count_slots
from moe_jax.training.placement.migration import Migration
from moe_jax.training.step import TrainProgram


class MeasuredStep(NamedTuple):
    """One training step."""

    seconds: float
    traffic_LRE: np.ndarray  # choices by source rank and expert
    wanted_LRR: np.ndarray  # choices by source and destination rank, dropped ones included
    dropped: float  # share of them
    rounds: int  # over all layers


def benchmark_placement(args: argparse.Namespace, mesh: MeshConfig) -> Results:
    """Device load, drop rate with a capacity and step time without one, before and after;
    predictions beside what came.
    """
    if mesh.data != 1 or mesh.expert < 2:
        raise UserError(
            f"--data {mesh.data} --expert {mesh.expert}: a step can be replayed exactly with "
            f"--data 1 and --expert 2 or more."
        )
    if args.accumulation != 1:
        raise UserError(
            f"--accumulation {args.accumulation}: a step can be replayed exactly in one part; "
            f"leave it out."
        )
    if args.dropless:
        raise UserError(
            "--dropless: placement measures steps with a capacity and dropless ones; leave it out."
        )
    return _compare(args, mesh, dropless=False) | _compare(args, mesh, dropless=True)


def _compare(args: argparse.Namespace, mesh: MeshConfig, dropless: bool) -> Results:
    program = build_program(args, mesh, dropless)
    capacity = pool_capacity(
        args.batch * args.seq // mesh.expert, args.top_k, mesh.expert, args.capacity_factor
    )
    migration, where = Migration(program), program.placement
    state = program.init(0)
    state, first = _steps(program, state, args, 0, args.warmup + 2 * args.steps)
    first = first[args.warmup :]
    tables = {"contiguous": where} | _plan(program, first[: args.steps], args)
    steps: dict[str, list[MeasuredStep]] = {name: [] for name in tables}
    for turn in range(args.turns):
        for number, (name, table) in enumerate(tables.items()):
            state, moved = migration(state, migration.plan(where, table))
            where = table
            state, measured = _steps(
                program, state, args, 1000 * (turn * len(tables) + number + 1), args.steps
            )
            steps[name] += measured
            line = (
                f"{'dropless' if dropless else 'capacity'} {name:10} "
                f"{statistics.median(m.seconds for m in measured):.3f} s a step"
            )
            print(
                f"{line}, {np.mean([m.dropped for m in measured]):.1%} dropped, {moved.experts} "
                f"experts had moved",
                flush=True,
            )
    replay = [
        planned_traffic(tables["planned"], m.traffic_LRE, np.zeros(mesh.expert, int))
        for m in first[args.steps :]
    ]
    before, after = (
        np.mean([max_over_mean(m.wanted_LRR.sum(1)).mean() for m in steps[name]])
        for name in ("contiguous", "planned")
    )
    predicted = np.mean([max_over_mean(r.load_LR).mean() for r in replay])
    name = "dropless" if dropless else "capacity"
    results: Results = {
        f"{name}_device_load_before": float(before),
        f"{name}_device_load_after": float(after),
        f"{name}_device_load_predicted": float(predicted),
        f"{name}_step_seconds_before": _seconds(steps["contiguous"]),
        f"{name}_step_seconds_after": _seconds(steps["planned"]),
    }
    if dropless:
        return results | _predict_seconds(
            steps,
            [float(np.ceil(r.sent_LRR.max((1, 2)) / capacity).clip(1).sum()) for r in replay],
            args.skew,
        )
    lost = [np.maximum(r.sent_LRR - capacity, 0).sum() / r.sent_LRR.sum() for r in replay]
    return results | {
        "dropped_fraction_before": float(np.mean([m.dropped for m in steps["contiguous"]])),
        "dropped_fraction_after": float(np.mean([m.dropped for m in steps["planned"]])),
        "dropped_fraction_predicted": float(np.mean(lost)),
    }


def _predict_seconds(
    steps: dict[str, list[MeasuredStep]], rounds: list[float], skew: float
) -> Results:
    """A step's time under the planned table from its predicted rounds and what a round costs, which
    contiguous and packed show.
    """
    seconds = {name: _seconds(measured) for name, measured in steps.items()}
    mean = {name: float(np.mean([m.rounds for m in measured])) for name, measured in steps.items()}
    if mean["packed"] == mean["contiguous"]:
        raise UserError(
            f"--skew {skew:g} is too even: the worst table takes as many rounds as contiguous, so "
            f"a round has no price."
        )
    a_round = (seconds["packed"] - seconds["contiguous"]) / (mean["packed"] - mean["contiguous"])
    predicted = seconds["contiguous"] + a_round * (float(np.mean(rounds)) - mean["contiguous"])
    return {
        "seconds_a_round": a_round,
        "rounds_before": mean["contiguous"],
        "rounds_after": mean["planned"],
        "rounds_predicted": float(np.mean(rounds)),
        "dropless_step_seconds_packed": seconds["packed"],
        "rounds_packed": mean["packed"],
        "dropless_step_seconds_predicted": predicted,
        "gain_predicted": 1 - predicted / seconds["contiguous"],
        "gain_realised": 1 - seconds["planned"] / seconds["contiguous"],
    }


def build_program(args: argparse.Namespace, mesh: MeshConfig, dropless: bool) -> TrainProgram:
    """The options' training program; only the placement evens out the load, and routers stay."""
    return build(
        args,
        mesh,
        redundant_slots=args.redundant_slots,
        learning_rate=1e-8,
        dropless=dropless,
        aux_loss=0.0,
        dispatch="pooled",
    )


def _plan(
    program: TrainProgram, measured: list[MeasuredStep], args: argparse.Namespace
) -> dict[str, Placement]:
    traffic_LRE, old = np.sum([m.traffic_LRE for m in measured], axis=0), program.placement
    options: dict[str, Any] = {
        "ranks": old.ranks,
        "redundant_slots": args.redundant_slots,
        "topology": None,
        "present": old,
    }
    order_LE = np.argsort(-traffic_LRE.sum(1), axis=1, kind="stable")
    share = -(-old.num_experts // old.ranks)
    packed = np.full(
        (
            len(order_LE),
            old.ranks,
            count_slots(old.num_experts, old.ranks, args.redundant_slots) // old.ranks,
        ),
        -1,
    )
    for layer, order in enumerate(order_LE):
        for rank in range(old.ranks):
            own = order[rank * share : (rank + 1) * share]
            packed[layer, rank, : own.size] = own
    return {
        "packed": Placement(packed.reshape(len(order_LE), -1), old.num_experts, old.ranks),
        "planned": plan_placement(args.strategy, traffic_LRE, **options),
    }


def _steps(
    program: TrainProgram, state: Any, args: argparse.Namespace, seed: int, count: int
) -> tuple[Any, list[MeasuredStep]]:
    measured = []
    for step in range(count):
        batch = program.shard(skewed_batch(args, seed + step))
        began = time.perf_counter()
        state, stats = program.train_step(state, batch)
        layers = jax.device_get(stats).layers
        seconds = time.perf_counter() - began
        wanted_LRR = layers.counts.sent_RR + layers.counts.dropped_RR
        measured.append(
            MeasuredStep(
                seconds,
                layers.counts.traffic_RE,
                wanted_LRR,
                layers.dropped.sum() / wanted_LRR.sum(),
                int(layers.rounds.sum()),
            )
        )
    return state, measured


def skewed_batch(args: argparse.Namespace, seed: int) -> dict[str, np.ndarray]:
    """Tokens whose frequencies fall by Zipf's law with exponent `skew`, as words of a text do; one
    document a sequence.
    """
    share = np.arange(1, args.vocab + 1) ** -args.skew
    tokens = (
        np.random.default_rng(seed)
        .choice(args.vocab, (args.batch, args.seq + 1), p=share / share.sum())
        .astype(np.int32)
    )
    return one_document(tokens)


def _seconds(measured: list[MeasuredStep]) -> float:
    return statistics.median(m.seconds for m in measured)
