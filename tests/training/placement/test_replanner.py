"""Decisions to move experts, and whole runs in which they move."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_jax.checkpoint.manager import Checkpoints
from moe_jax.config.schema import PlacementConfig
from moe_jax.errors import UserError
from moe_jax.moe.stats import RoutingCounts
from moe_jax.placement.cost import max_over_mean, planned_traffic
from moe_jax.placement.table import Placement, contiguous
from moe_jax.placement.topology import Topology
from moe_jax.training.placement.decision import decide
from moe_jax.training.placement.initial import processes_per_row
from moe_jax.training.placement.replanner import Replanner
from moe_jax.training.state import TrainState
from moe_jax.training.step import TrainProgram
from tests.support.tiny_programs import EXPERTS, make_batch, make_program
from tests.support.tiny_run import (
    STATEFUL,
    copy_until,
    finished,
    lines,
    run,
    training_lines,
    without_times,
)

RANKS, LAYERS = 4, 2
HOT = np.array([90, 90, 1, 1, 1, 1, 1, 1])  # both on device 0
FAST = Topology(1, 8, 1e12, 1e12, 0.0, 0.0)


@pytest.fixture(scope="module")
def program() -> TrainProgram:
    return make_program(2, RANKS)


@pytest.fixture
def state(program: TrainProgram) -> TrainState:
    return program.init(0)


def replanner(program: TrainProgram, topology: Topology = FAST, **changes: Any) -> Replanner:
    return Replanner(
        PlacementConfig(**dict(strategy="balanced", replan_every=4) | changes), topology, program
    )


def counts_of(load_LE: np.ndarray, placement: Placement) -> RoutingCounts:
    """A step in which every source chooses alike; what the replanner does not read is left out."""
    traffic = np.repeat(np.broadcast_to(load_LE, (LAYERS, EXPERTS))[:, None], RANKS, axis=1)
    first = placement.first_slot()
    slot_P = np.stack(
        [np.bincount(f, w, placement.num_slots) for f, w in zip(first, traffic.sum(1), strict=True)]
    ).astype(int)
    total = np.zeros((LAYERS, RANKS, RANKS), int)
    total[:, 0, 0] = traffic.sum((1, 2))
    return RoutingCounts(
        traffic, total, np.zeros_like(total), slot_P.reshape(LAYERS, 1, RANKS, -1).sum(-1), slot_P
    )


def observe(planner: Replanner, *loads: np.ndarray) -> None:
    for load in loads:
        planner.observe(counts_of(load, planner.placement), 1, 0.5)


def test_a_steady_skew_parts_the_two_busiest_experts(program, state):
    planner = replanner(program)
    observe(planner, HOT, HOT, HOT)
    for step in (1, 2, 3):
        assert planner.replan(step, state, 100)[1] == []
    observe(planner, HOT)
    state, (event,) = planner.replan(4, state, 100)
    assert event["accepted"] and event["moves"] == 2 * LAYERS and event["strategy"] == "balanced"
    homes = planner.placement.first_slot() // (planner.placement.num_slots // RANKS)
    assert np.all(homes[:, 0] != homes[:, 1])
    np.testing.assert_array_equal(state.expert_LP, planner.placement.physical_to_logical)
    predicted = event["predicted"]
    assert predicted["max_over_mean_before"] == pytest.approx(180 / (HOT.sum() / 4))
    assert predicted["max_over_mean_after"] == pytest.approx(91 / (HOT.sum() / 4))
    assert predicted["gain"] == pytest.approx(1 - 91 / 180)
    # What came of it is told at the next turn, and then there is nothing to gain.
    observe(planner, HOT, HOT, HOT, HOT)
    state, (realised, refused) = planner.replan(8, state, 100)
    assert realised["of_step"] == 4 and realised["realised_gain"] == pytest.approx(
        realised["predicted_gain"]
    )
    assert (
        not refused["accepted"]
        and "no layer would gain" in refused["why"]
        and refused["moves"] == 0
    )
    assert planner.decided is None


def test_a_decision_is_data_and_changes_nothing(program):
    planner = replanner(program)
    observe(planner, HOT, HOT, HOT, HOT)
    before = planner.to_json()
    decision = decide(planner.window, planner.placement, planner.prices, 10)
    assert planner.to_json() == before
    assert decision.accepted and decision.plan.old is planner.placement
    assert len(decision.plan.moves) == decision.plan.sent == 2 * LAYERS
    assert decision.migration_bytes == decision.plan.sent * planner.prices.migration.expert_bytes
    assert decision.saved_seconds == pytest.approx(
        10 * (decision.before.seconds - decision.after.seconds)
    )
    assert decision.why().startswith("the busiest device had 3.87 times the mean load")
    with pytest.raises(dataclasses.FrozenInstanceError):
        decision.horizon = 1


def test_steps_of_both_halves_are_never_counted_together(program):
    planner = replanner(program)  # the first half has two steps
    counts = counts_of(HOT, planner.placement)
    assert [planner.must_observe(1, 100, unseen) for unseen in (1, 2)] == [False, True]
    with pytest.raises(AssertionError, match="halves"):
        planner.observe(counts, 3, 1.5)
    planner.observe(counts, 2, 1.0)
    assert not planner.must_observe(3, 100, 1) and planner.must_observe(4, 100, 2)
    assert planner.must_observe(3, 3, 1)  # the last step tells what came of a decision
    planner.observe(counts, 2, None)
    window = planner.window
    assert (window.steps, window.earlier, window.timed, window.seconds) == (4, 2, 2, 1.0)
    assert planner.due(4, 100)


def test_a_load_that_turns_around_moves_nothing(program, state):
    """Planned by the first half of the window, the second would be no better: it is not
    believed.
    """
    planner = replanner(program)
    other = np.array([1, 90, 90, 1, 1, 1, 1, 1])
    observe(planner, other, other, HOT * 0 + 24, HOT * 0 + 24)
    _, (event,) = planner.replan(4, state, 100)
    assert not event["accepted"] and "no layer would gain" in event["why"]
    np.testing.assert_array_equal(
        planner.placement.physical_to_logical, program.placement.physical_to_logical
    )


def test_only_layers_that_gain_move(program, state):
    planner = replanner(program)
    observe(planner, *[np.stack([HOT, np.full(EXPERTS, 24)])] * 4)
    _, (event,) = planner.replan(4, state, 100)
    assert event["accepted"] and event["moves"] == 2
    np.testing.assert_array_equal(
        planner.placement.physical_to_logical[1], program.placement.physical_to_logical[1]
    )


def test_a_move_that_takes_longer_than_it_saves_is_refused(program, state):
    """Links so slow that computing takes no time beside them, and so few rows that two experts
    weigh more.
    """
    planner = replanner(program, dataclasses.replace(FAST, bandwidth_within=1.0))
    observe(planner, *[np.array([1, 1, 0, 0, 0, 0, 0, 0])] * 4)
    _, (event,) = planner.replan(4, state, 100)
    assert 0 < event["predicted"]["seconds_per_step"] * 4 < event["seconds_estimated"]
    assert (
        not event["accepted"]
        and event["why"].startswith("moving would take")
        and event["moves"] == 0
    )
    np.testing.assert_array_equal(
        planner.placement.physical_to_logical, program.placement.physical_to_logical
    )


def test_a_resumed_window_decides_alike(program, state):
    loads = [HOT, HOT + np.arange(8), HOT, HOT[::-1]]
    whole, killed = replanner(program), replanner(program)
    observe(whole, *loads)
    observe(killed, *loads[:3])
    resumed = replanner(program)
    resumed.restore(json.loads(json.dumps(killed.to_json())), program.placement)
    observe(resumed, *loads[3:])
    _, (expected,) = whole.replan(4, program.init(0), 100)
    _, (event,) = resumed.replan(4, program.init(0), 100)
    assert event | {"seconds": 0} == expected | {"seconds": 0}
    other = replanner(make_program(1, 2))  # of another mesh: counting starts again
    other.restore(killed.to_json(), program.placement)
    assert (killed.window.steps, other.window.steps) == (3, 0)


def test_a_window_too_short_to_be_tried_on_itself_goes_on(program, state):
    planner = replanner(program)
    observe(planner, HOT, HOT)  # as when a run is resumed between decisions
    assert planner.replan(4, state, 100)[1] == [] and planner.window.steps == 2
    observe(planner, HOT, HOT, HOT, HOT)
    _, (event,) = planner.replan(8, state, 100)
    assert event["accepted"] and sum(event["predicted"]["device_load_before"]) == pytest.approx(
        LAYERS * RANKS * HOT.sum()
    )


def test_the_last_step_tells_what_came_and_decides_nothing(program, state):
    planner = replanner(program)
    observe(planner, HOT, HOT, HOT, HOT)
    state, _ = planner.replan(4, state, 6)
    observe(planner, HOT, HOT)
    (realised,) = planner.replan(6, state, 6)[1]
    assert realised["event"] == "placement_realised" and realised["realised_gain"] == pytest.approx(
        realised["predicted_gain"]
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            dict(strategy="contiguous", replan_every=5),
            "placement.replan_every=5 needs a strategy that plans",
        ),
        (
            dict(strategy="balanced"),
            "placement.strategy=balanced with placement.replan_every=0 would never plan",
        ),
        (dict(strategy="custom"), "placement.strategy=custom with placement.file=null"),
        (
            dict(strategy="custom", file="t.json", redundant_slots=1),
            "placement.redundant_slots=1 does not go with placement.strategy=custom",
        ),
        (dict(file="table.json"), "placement.strategy=contiguous with placement.file=table.json"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        PlacementConfig(**changes)


# Whole runs.

MOVING = (
    *STATEFUL,
    "placement.strategy=balanced",
    "placement.redundant_slots=1",
    "placement.replan_every=3",
    "placement.min_gain=0.0",
)


@pytest.fixture(scope="module")
def moving(folder: Path) -> Path:
    return finished(folder, *MOVING, "checkpoint.every=2")


def placement_of(directory: Path, step: int) -> Placement:
    return Placement.from_json(
        Checkpoints(directory / "checkpoints", 9, 1).read_meta(step)["placement"]
    )


@pytest.mark.slow
def test_a_run_in_which_experts_move_tells_of_it_and_saves_where_they_are(moving: Path) -> None:
    events = [line for line in lines(moving) if line.get("event") == "placement"]
    assert [event["step"] for event in events] == [3, 6]
    assert any(event["accepted"] for event in events)
    start = contiguous(2, 4, 4, 1)
    np.testing.assert_array_equal(
        placement_of(moving, 2).physical_to_logical, start.physical_to_logical
    )
    assert not np.array_equal(
        placement_of(moving, 8).physical_to_logical, start.physical_to_logical
    )
    traffic = json.loads((moving / "traffic.json").read_text())
    shapes = (
        len(traffic["layers"]),
        len(traffic["traffic"]),
        len(traffic["traffic"][0]),
        len(traffic["traffic"][0][0]),
    )
    assert shapes == (2, 2, 4, 4) and traffic["steps"] == 3


def test_what_the_lines_count_adds_up(moving: Path) -> None:
    for line in training_lines(moving):
        for layer in line["layers"]:
            assert sum(layer["device_load"]) == sum(layer["load"]) == sum(layer["slot_load"])
            assert sum(layer["dropped_to"]) == layer["dropped"] and len(layer["device_load"]) == 8
    sent = {event["step"]: event for event in lines(moving) if event.get("event") == "traffic"}
    kept = {line["step"]: line["kept"] for line in training_lines(moving)}
    assert sum(np.sum(layer["sent"]) for layer in sent[2]["layers"]) == kept[1] + kept[2]


@pytest.mark.parametrize("step", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_killed_between_moves_resumes_bit_for_bit(
    step: int, moving: Path, folder: Path, tmp_path: Path
) -> None:
    copy = copy_until(moving, tmp_path / "copy", step)
    run(folder, copy, *MOVING, "checkpoint.every=2", resume=True)
    assert without_times(training_lines(copy)) == without_times(training_lines(moving))
    for later in range(step, 9, 2):
        np.testing.assert_array_equal(
            placement_of(copy, later).physical_to_logical,
            placement_of(moving, later).physical_to_logical,
        )
    arrays = [
        Checkpoints(place / "checkpoints", 9, 1)._find(8) / "manifest.json"
        for place in (copy, moving)
    ]
    sums = [
        {name: a["checksum"] for name, a in json.loads(path.read_text())["arrays"].items()}
        for path in arrays
    ]
    assert sums[0] == sums[1]


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh_with_a_plan_by_the_load_it_measured(
    moving: Path, folder: Path, tmp_path: Path
) -> None:
    copy = copy_until(
        moving, tmp_path / "copy", 6
    )  # saved at a decision, when the newest window had just begun
    mesh = ("mesh.data=1", "mesh.expert=8", "placement.replan_every=100")
    run(folder, copy, *MOVING, *mesh, resume=True)
    start = placement_of(copy, 8)
    assert start.ranks == 8 and not np.array_equal(
        start.physical_to_logical, contiguous(2, 4, 8, 1).physical_to_logical
    )
    load_LE = np.sum(
        [[layer["load"] for layer in line["layers"]] for line in training_lines(moving)[3:6]],
        axis=0,
    )
    traffic_LRE = np.repeat(load_LE[:, None] / 8, 8, axis=1)
    planned, plain = (
        max_over_mean(planned_traffic(t, traffic_LRE, np.zeros(8, int)).load_LR)
        for t in (start, contiguous(2, 4, 8, 1))
    )
    assert np.all(planned < plain) and np.all(planned < 1.1)


@pytest.mark.slow
def test_a_custom_table_is_followed_and_a_wrong_one_refused(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    mine = Placement(np.array([[3, 2, 1, 0], [1, 0, 3, 2]]), 4, 4)
    table.write_text(json.dumps(mine.to_json()))
    custom = ("placement.strategy=custom", f"placement.file={table}")
    directory = run(folder, tmp_path / "run", *custom)
    np.testing.assert_array_equal(
        placement_of(directory, 6).physical_to_logical, mine.physical_to_logical
    )
    moved = copy_until(directory, tmp_path / "moved", 3)  # to where the file is not
    table.unlink()
    run(folder, moved, *custom, resume=True)
    assert lines(moved) == lines(directory)
    with pytest.raises(UserError, match=r"typo\.json"):
        again = ("placement.strategy=custom", f"placement.file={tmp_path}/typo.json")
        run(folder, moved, *again, "train.steps=7", resume=True)
    table.write_text(
        json.dumps(mine.to_json() | {"physical_to_logical": [[3, 2, 1, 0], [1, 0, 3, 3]]})
    )
    with pytest.raises(UserError, match=r"layer 1.* expert 2"):
        run(folder, tmp_path / "other", *custom)
    assert not (tmp_path / "other").exists()


def test_a_device_without_room_is_refused(folder: Path, tmp_path: Path) -> None:
    topology = tmp_path / "topology.yaml"
    rates = "bandwidth_within: 1e9\nbandwidth_between: 1e9\nlatency_within: 0\nlatency_between: 0\n"
    topology.write_text(f"hosts: 2\ndevices_per_host: 4\n{rates}memory: 1000\n")
    with pytest.raises(UserError, match="1,000 bytes of memory"):
        run(folder, tmp_path / "run", f"placement.topology={topology}")
    topology.write_text(f"hosts: 2\ndevices_per_host: 8\n{rates}")
    with pytest.raises(UserError, match="16 devices"):
        run(folder, tmp_path / "run", f"placement.topology={topology}")


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        ([[[0], [0], [0], [0]]], 1),
        ([[[0], [0], [1], [1]]], 2),
        ([[[0], [1], [2], [3]]], 4),
        ([[[0], [0]], [[1], [1]]], 1),  # each row within a host
        ([[[0], [0], [1], [1]], [[2], [2], [3], [3]]], 2),
        ([[[0], [1], [1], [1]]], 1),  # unequal parts
        ([[[0], [1], [0], [1]]], 1),  # not in runs
        ([[[0, 0, 1, 1], [2, 2, 3, 3]]], 1),  # a tensor group on two hosts
    ],
)
def test_hosts_are_what_the_devices_processes_show(processes, expected):
    assert processes_per_row(np.array(processes)) == expected


@pytest.mark.slow
def test_two_hosts_route_as_one_to_the_same_losses() -> None:
    """With replicas on their own hosts preferred, only where rows go differs from a single host."""
    settings = dict(moe=dict(dispatch="pooled"), redundant=1)
    one, two = make_program(2, 4, **settings), make_program(2, 4, **settings, hosts=2)
    figures = []
    for program in (one, two):
        state = program.init(3)
        for step in range(2):
            state, stats = program.train_step(state, program.shard(make_batch(step)))
        figures.append(jax.tree.map(np.asarray, stats))
    np.testing.assert_allclose(figures[0].loss, figures[1].loss, rtol=1e-6)
    flows = [f.layers.counts for f in figures]
    np.testing.assert_array_equal(flows[0].traffic_RE, flows[1].traffic_RE)
    away = [counts.sent_RR[:, :2, 2:].sum() + counts.sent_RR[:, 2:, :2].sum() for counts in flows]
    assert away[1] < away[0]
