"""metrics.jsonl and its columns: exact floats, valid JSON whatever the values, resumption, damage,
closed forms.
"""

from __future__ import annotations

import errno
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event, SessionLog

from moe_jax.errors import UserError
from moe_jax.tracking.history import (
    decisions,
    describe_links,
    measured_link_rows,
    read_history,
    relative_load,
    running_mean,
)
from moe_jax.tracking.metrics import (
    MetricsWriter,
    dead_experts,
    load_max_over_mean,
    max_violation,
    read_metrics,
)
from tests.support import monitored_run


def write(run_dir: Path, records: list[dict], resume_step: int | None = None) -> Path:
    writer = MetricsWriter(run_dir, resume_step)
    for record in records:
        writer.write(record)
    writer.close()
    return run_dir / "metrics.jsonl"


def training(step: int, load: tuple[int, ...] = (3, 1), **changes) -> dict:
    layer = {
        "layer": 1,
        "load": list(load),
        "max_violation": max_violation(load),
        "dead_experts": 0,
        "router_entropy": 0.5,
        "dropped": 0,
    }
    return {
        "step": step,
        "loss": 0.1 * step,
        "kept": 4,
        "dropped": 0,
        "tokens_per_second": 7.0,
        "layers": [layer],
        **changes,
    }


def events(run_dir: Path) -> list[list[Event]]:
    """The events of each TensorBoard file, in the order in which TensorBoard reads the files."""
    files = []
    for path in sorted((run_dir / "tensorboard").iterdir()):
        data, place, found = path.read_bytes(), 0, []
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            found.append(Event.FromString(data[place + 12 : place + 12 + length]))
            place += 16 + length
        files.append(found)
    return files


def scalars(file: list[Event]) -> dict[tuple[int, str], float]:
    return {
        (event.step, value.tag): value.simple_value
        for event in file
        for value in event.summary.value
    }


@pytest.mark.parametrize(
    ("load", "violation", "dead"),
    [
        ([5, 5, 5, 5], 0.0, 0),
        ([12, 0, 0, 0], 3.0, 3),
        ([4, 2, 0], 1.0, 1),
        ([0, 0], 0.0, 2),
        ([7], 0.0, 0),
    ],
)
def test_load_figures_in_closed_form(load: list[int], violation: float, dead: int) -> None:
    assert max_violation(load) == violation
    assert load_max_over_mean(load) == 1 + violation
    assert max_violation(np.array(load, np.int32)) == violation
    assert dead_experts(load) == dead


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_floats_round_trip_exactly(
    tmp_path_factory: pytest.TempPathFactory, values: list[float]
) -> None:
    path = write(tmp_path_factory.mktemp("run"), [{"step": 1, "values": values}])
    (record,) = read_metrics(path)
    assert [struct.pack("d", value) for value in record["values"]] == [
        struct.pack("d", value) for value in values
    ]


def test_numpy_values_become_json(tmp_path: Path) -> None:
    path = write(
        tmp_path, [{"step": np.int32(3), "loss": np.float32(0.1), "load": np.array([1, 2])}]
    )
    assert read_metrics(path) == [{"step": 3, "loss": float(np.float32(0.1)), "load": [1, 2]}]


def test_nonfinite_floats_are_null_and_named(tmp_path: Path) -> None:
    record = training(1, loss=math.nan, grad_norm=np.float32("inf"))
    record["layers"][0]["router_entropy"] = -math.inf
    line = write(tmp_path, [record]).read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    read = json.loads(line, parse_constant=refuse)
    assert (
        read["loss"] is None
        and read["grad_norm"] is None
        and read["layers"][0]["router_entropy"] is None
    )
    assert read["nonfinite"] == {
        "loss": "nan",
        "grad_norm": "inf",
        "layers.0.router_entropy": "-inf",
    }
    assert "train/loss" not in {tag for _, tag in scalars(events(tmp_path)[0])}


def test_lines_are_readable_before_the_file_is_closed(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write({"step": 1, "loss": 2.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    writer.close()


def test_new_run_refuses_an_existing_file(tmp_path: Path) -> None:
    path = write(tmp_path, [training(1)])
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl exists.*--resume.*--overwrite"):
        MetricsWriter(tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("tail", ["", '{"step": 7, "lo', '{"step": 7'])
@pytest.mark.parametrize("resume_step", [0, 3, 6])
def test_resumed_file_equals_an_uninterrupted_one(
    tmp_path: Path, resume_step: int, tail: str
) -> None:
    def records(steps: range) -> list[dict]:
        return [
            record
            for step in steps
            for record in (training(step), {"step": step, "val_loss": 1.0 / step})
        ]

    whole = write(tmp_path / "whole", records(range(1, 9)))
    cut = write(tmp_path / "cut", records(range(1, 7)))
    with cut.open("a") as file:
        file.write(tail)
    write(tmp_path / "cut", records(range(resume_step + 1, 9)), resume_step)
    assert cut.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in cut.parent.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_last_line_cut_exactly_before_its_newline_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path, [training(1), training(2)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    MetricsWriter(tmp_path, 2).close()
    assert path.read_bytes() == whole


def test_torn_last_line_alone_is_tolerated(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "loss"')
    assert read_metrics(path) == [{"step": 1}]
    for bad in ('{"step": 2, "lo\n', "[2]\n", '{"loss": 1}\n', "\n", '{"step": null}\n'):
        path.write_text('{"step": 1}\n' + bad + '{"step": 3}\n')
        with pytest.raises(UserError, match=r"metrics\.jsonl line 2 "):
            read_metrics(path)
        with pytest.raises(UserError, match=r"metrics\.jsonl line 2 "):
            MetricsWriter(tmp_path, 1)
        assert path.read_text().endswith('{"step": 3}\n')


def test_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_resumed_run_without_its_file_begins_one_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where checkpoints and config.yaml alone were copied to another machine."""
    path = write(tmp_path, [training(6)], resume_step=5)
    assert [record["step"] for record in read_metrics(path)] == [6]
    assert "metrics.jsonl is not there: a new one begins after step 5" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the always full device of Linux")
def test_full_disk_passes_upward(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer._file.close()
    with Path("/dev/full").open("ab") as full:
        writer._file = full
        with pytest.raises(OSError) as error:
            writer.write({"step": 1})
        assert error.value.errno == errno.ENOSPC
        with pytest.raises(OSError):
            writer.close()


def test_tensorboard_holds_scalars_and_purges_on_resume(tmp_path: Path) -> None:
    write(
        tmp_path,
        [
            training(1),
            {"step": 1, "val_loss": 0.25},
            {"step": 1, "event": "checkpoint", "seconds": 2.0},
            training(2),
        ],
    )
    write(tmp_path, [training(2)], resume_step=1)
    first, second = events(tmp_path)
    assert scalars(first)[1, "validation/val_loss"] == 0.25
    assert scalars(first)[1, "max_violation/layer_1"] == 0.5
    assert scalars(first)[2, "train/loss"] == pytest.approx(0.2)
    assert not any("seconds" in tag for _, tag in scalars(first))
    starts = [
        event.step
        for event in second
        if event.HasField("session_log") and event.session_log.status == SessionLog.START
    ]
    assert starts == [2]
    assert [event for event in first if event.HasField("session_log")] == []


def test_tensorboard_shows_the_balance_of_each_layer(tmp_path: Path) -> None:
    write(tmp_path, [monitored_run.training(1), monitored_run.decision(1)])
    (file,) = events(tmp_path)
    shown = {tag: value for (_, tag), value in scalars(file).items()}
    assert (
        shown["train/device_load_max_over_mean"]
        == shown["device_load_max_over_mean/layer_1"]
        == pytest.approx(30 / 23.75)
    )
    assert (
        shown["dropped_fraction/layer_0"] == pytest.approx(0.05)
        and shown["dead_experts/layer_0"] == 0
    )
    assert shown["train/dropped_fraction"] == pytest.approx(0.05)


def test_history_of_placement(tmp_path: Path) -> None:
    records = [
        training(1, layers=[{**monitored_run.training(1)["layers"][0], "layer": 1}]),
        training(2, load=(1, 1, 1, 1)),
        *monitored_run.whole_run(1)[-3:],
    ]
    records += [
        monitored_run.traffic(5),
        monitored_run.decision(2),
        monitored_run.decision(3),
        monitored_run.realised(4, 2),
    ]
    history = read_history(write(tmp_path, records))
    np.testing.assert_array_equal(history.device_load_NL, [[30 / 23.75], [math.nan]])
    assert [load_LP.tolist() for load_LP in history.slot_load] == [[monitored_run.SLOT_LOAD], [[]]]
    assert history.traffic == monitored_run.traffic(5) and "traffic" not in [
        event["event"] for event in history.events
    ]
    made = decisions(history.events)
    assert [
        (decision["step"], decision["realised"] and decision["realised"]["realised_gain"])
        for decision in made
    ] == [
        (2, 0.2),
        (3, None),
    ]


def test_links_are_described_in_closed_form() -> None:
    rows_RR = measured_link_rows(monitored_run.traffic(5))
    np.testing.assert_array_equal(rows_RR, [[30, 30], [10, 30]])
    assert describe_links(rows_RR) == "0 to 1 is busiest, 30 rows (1.50 x mean); 40% travel"
    assert (
        describe_links(np.diag([3.0, 4.0]))
        == describe_links(np.ones((1, 1)))
        == "all rows stay on their device"
    )


def test_history_sorts_records_into_columns(tmp_path: Path) -> None:
    records = [
        training(1),
        training(2, load=(0, 4), loss=math.nan, dropped=1),
        {"step": 2, "val_loss": 3.0},
        {"step": 2, "event": "resumed"},
        training(3, tokens_per_second=1.0),
        training(4, tokens_per_second=9.0),
    ]
    history = read_history(write(tmp_path, records))
    assert history.layers == [1]
    np.testing.assert_array_equal(history.column("loss"), [0.1, math.nan, 0.1 * 3, 0.4])
    np.testing.assert_array_equal(history.column("absent"), [math.nan] * 4)
    np.testing.assert_array_equal(history.after_compile, [False, True, False, True])
    np.testing.assert_array_equal(
        history.steady("tokens_per_second"), [math.nan, 7.0, math.nan, 9.0]
    )
    np.testing.assert_array_equal(history.load_NLE[:, 0], [[3, 1], [0, 4], [3, 1], [3, 1]])
    np.testing.assert_array_equal(history.max_violation_NL[:, 0], [0.5, 1.0, 0.5, 0.5])
    np.testing.assert_array_equal(history.validation["val_loss"], [3.0])
    assert history.drop_share() == 1 / 17
    assert [event["event"] for event in history.events] == ["resumed"]


def test_history_refuses_what_it_cannot_show(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "val_loss": 2.0}\n')
    with pytest.raises(UserError, match="no training line"):
        read_history(path)
    path.write_text(json.dumps(training(1)) + "\n" + json.dumps(training(2, layers=[])) + "\n")
    with pytest.raises(UserError, match="other MoE layers at step 2"):
        read_history(path)


def test_running_mean_leaves_out_what_is_not_finite() -> None:
    values = np.arange(150.0)
    values[10] = math.nan
    smooth, window = running_mean(values)
    assert window == 3
    np.testing.assert_allclose(smooth[[0, 1, 2, 10, 12, 149]], [0.0, 0.5, 1.0, 8.5, 11.5, 148.0])
    assert np.isnan(running_mean(np.full(3, math.nan))[0]).all()


def test_relative_load_pools_steps_and_is_one_on_average() -> None:
    load_NLE = np.array([[[1, 3]], [[3, 1]], [[0, 8]], [[0, 0]]], np.float32)
    edges, ratio_BLE = relative_load(np.array([10.0, 20, 30, 40]), load_NLE, 2)
    np.testing.assert_array_equal(edges, [5, 25, 45])
    np.testing.assert_array_equal(ratio_BLE, [[[1, 1]], [[0, 2]]])
    _, one = relative_load(np.array([1.0]), load_NLE[3:], 2)
    np.testing.assert_array_equal(one, [[[0, 0]]])


def test_the_writer_of_another_process_touches_nothing(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 3, active=False)
    writer.write({"step": 4, "loss": 1.0})
    writer.close()
    assert not list(tmp_path.iterdir())
