"""A run's metrics: written one JSON line a record, with a copy for TensorBoard, and read back.

`metrics.jsonl` is the record of a run (docs/metrics.md has its schema); reports, checks and other
people's scripts read it. Only the first process of a run writes it. Nothing here needs a device.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from moe_jax.errors import UserError
from moe_jax.placement import cost
from moe_jax.utils.files import local_path, replace_bytes
from moe_jax.utils.progress import say

FILE_NAME = "metrics.jsonl"
# What the losses of a run are in.
NATS, QUANTILE_LOSS = "nats/token", "quantile loss of a normalised value"


def load_max_over_mean(load: ArrayLike) -> float:
    """How many times the mean the largest of `load` [n] counts is: 1 is even, n is all on one; 1
    too where all are 0.
    """
    return float(cost.max_over_mean(np.asarray(load, dtype=np.float64)))


def max_violation(load: ArrayLike) -> float:
    """How far the fullest expert is above the mean: max / mean - 1 of `load` [E] counts; 0 is even,
    E - 1 is all to one.

    Where no token was routed at all it is 0.
    """
    return load_max_over_mean(load) - 1.0


def dead_experts(load: ArrayLike) -> int:
    """How many experts of `load` [E] counts got no token."""
    return int(np.count_nonzero(np.asarray(load) == 0))


def is_number(value: Any) -> bool:
    """Whether a field is a scalar that can be plotted; true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class MetricsWriter:
    """Appends records to RUN_DIR/metrics.jsonl and mirrors their scalars to RUN_DIR/tensorboard.

    A new run (`resume_step=None`) must find no metrics.jsonl. A resumed one keeps its lines up to
    and including `resume_step`, so that the file goes on as if the run had never stopped. Where the
    file is lost (checkpoints alone were copied) it begins a new one and says so: what was learnt
    does not depend on it.
    """

    def __init__(
        self, run_dir: Path, resume_step: int | None = None, *, active: bool = True
    ) -> None:
        """Raises UserError where a new run finds metrics.jsonl, or a resumed one a damaged one.

        Of several processes one is `active`; the others' writers do nothing.
        """
        self._active = active
        if not active:
            return
        path = run_dir / FILE_NAME
        if resume_step is not None and not path.exists():
            say(
                f"{path} is not there: a new one begins after step {resume_step}, so the report "
                f"shows the later steps alone."
            )
        elif resume_step is not None:
            _keep_until(path, resume_step)
        elif path.exists():
            raise UserError(
                f"{path} exists already: continue that run with --resume, or replace it with "
                f"--overwrite."
            )
        self._events = _EventFile(
            run_dir / "tensorboard", purge_step=None if resume_step is None else resume_step + 1
        )
        self._file = path.open("ab")

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record, which has an int `step`, and flushes it.

        Floats are kept exactly. Numpy values become Python's own. A float that is not finite is
        written as null and named in `nonfinite`, since JSON has no NaN. OSError (a full disk)
        passes upward.
        """
        if not self._active:
            return
        nonfinite: dict[str, str] = {}
        clean = _as_json(record, "", nonfinite)
        if nonfinite:
            clean["nonfinite"] = nonfinite
        self._file.write(json.dumps(clean, allow_nan=False).encode() + b"\n")
        self._file.flush()
        self._events.write(clean["step"], _tensorboard_scalars(clean))

    def close(self) -> None:
        """Closes both files; needed once."""
        if not self._active:
            return
        try:
            self._file.close()
        finally:
            self._events.close()


def iter_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl, one at a time; `read_metrics` says what is tolerated."""
    return (record for _, record in _lines(path))


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl.

    A last line that a kill cut short is left out. Any other line that is no record, and a file that
    is not there, raise UserError.
    """
    return list(iter_metrics(local_path(path)))


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The record in a line of metrics.jsonl, or None where it is no JSON object with an int
    `step`.
    """
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line of a metrics.jsonl as it stands, newline included, with its record."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: name the directory of a run that has trained.")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            record = parse_record(line)
            if record is not None:
                yield line.rstrip(b"\n") + b"\n", record
            elif line.endswith(b"\n"):
                raise UserError(
                    f"{path} line {number} is not a metrics record with a step: remove that line "
                    f"or restore the file."
                )


def _keep_until(path: Path, step: int) -> None:
    """Rewrites a metrics.jsonl with only the lines up to `step`, byte for byte; killed in between,
    the old file stands.
    """
    kept = [line for line, record in _lines(path) if record["step"] <= step]
    replace_bytes(path, b"".join(kept), durable=True)


def _as_json(value: Any, path: str, nonfinite: dict[str, str]) -> Any:
    """`value` in JSON's types; the dotted path of each float that became null goes into
    `nonfinite`.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {
            key: _as_json(item, f"{path}.{key}" if path else key, nonfinite)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_as_json(item, f"{path}.{index}", nonfinite) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite[path] = repr(value)
        return None
    return value


def _tensorboard_scalars(record: dict[str, Any]) -> dict[str, float]:
    """What TensorBoard shows of a record, by tag: its scalars and each layer's balance; nothing of
    an event line.
    """
    if "event" in record:
        return {}
    group = "validation" if "val_loss" in record else "train"
    scalars = {
        f"{group}/{name}": value
        for name, value in record.items()
        if name != "step" and is_number(value)
    }
    for layer in record.get("layers", []):
        figures = {name: layer.get(name) for name in ("max_violation", "dead_experts")}
        if "device_load" in layer:
            figures["device_load_max_over_mean"] = load_max_over_mean(layer["device_load"])
        if "dropped" in layer:
            figures["dropped_fraction"] = layer["dropped"] / max(sum(layer["load"]), 1)
        scalars |= {
            f"{name}/layer_{layer['layer']}": value
            for name, value in figures.items()
            if is_number(value)
        }
    return scalars


class _EventFile:
    """A TensorBoard event file, written in the caller's thread.

    tensorboardX's SummaryWriter hands events to a thread through a bounded queue. On a full disk
    that thread dies, and the training loop would wait on the queue forever; here the error passes
    upward.
    """

    def __init__(self, directory: Path, purge_step: int | None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        # The writer's own name has seconds and host only: a quick resume would overwrite the first
        # file.
        self._writer = EventsWriter(
            str(directory / "events"), filename_suffix=f".{os.getpid()}.{purge_step or 0}"
        )
        if purge_step is not None:
            # TensorBoard forgets, from earlier files, what a killed process had logged beyond its
            # checkpoint.
            session = SessionLog(status=SessionLog.START)
            self._writer.write_event(
                Event(wall_time=time.time(), step=purge_step, session_log=session)
            )
        self._writer.flush()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        if scalars:
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
            self._writer.write_event(
                Event(wall_time=time.time(), step=step, summary=Summary(value=values))
            )
            self._writer.flush()

    def close(self) -> None:
        self._writer.close()
