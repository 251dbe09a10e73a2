"""What `moe-jax status` tells, read from the files of a run: while it trains, after its end, and
for runs of earlier versions, which have less of them.
"""

from __future__ import annotations

import json
import os
import socket
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.checkpoint.steps import COMMITTED, saved_steps, step_path
from moe_jax.placement.table import Placement
from moe_jax.tracking.metrics import FILE_NAME, iter_metrics, load_max_over_mean
from moe_jax.tracking.process_files import all_accounts, read_attempts, read_processes, steps_done
from moe_jax.tracking.run_dir import read_run_config, require_run_or_start
from moe_jax.tracking.status.goodput import goodput

SILENT = 10.0  # seconds without a word after which a process is silent, and not live
GROUPS = 8  # of layers, at most
RECENT = 20  # training lines whose load is compared
# A process is slow by itself where a step waits so much longer for its data than the others', as a
# part of the step; and for its experts where they have so much more load than the mean.
SLOW_DATA, MORE_LOAD = 0.1, 0.1


def gather_status(run_dir: Path, now: float) -> dict[str, Any]:
    """The status of a run at a wall time, in JSON's types.

    Raises UserError for a folder that is no run, and for damaged files.
    """
    require_run_or_start(run_dir)
    begun = (run_dir / "config.yaml").is_file()
    config = read_run_config(run_dir) if begun else None
    told, ended = read_processes(run_dir), read_attempts(run_dir)
    accounts = all_accounts(ended, told)
    recent = _read_metrics(run_dir / FILE_NAME)
    processes = [_process(said, now) for said in told]
    account = goodput(accounts) if accounts else None
    return {
        "run": str(run_dir),
        "state": _state(processes, accounts),
        "step": max([_newest_step(recent), *map(steps_done, told)], default=0),
        "steps": config.train.steps if config else None,
        "processes": processes,
        "slow": slow_process(told, recent),
        "mesh": asdict(config.mesh) if config else None,
        "experts": experts(recent[-1], config.mesh.expert) if recent and config else None,
        "checkpoint": _checkpoint(run_dir / "checkpoints", now),
        "attempts": len(accounts),
        "restarts": max(len(accounts) - 1, 0),
        "goodput": account and {**account._asdict(), "share": account.share},
    }


def experts(line: dict[str, Any], ranks: int) -> dict[str, Any] | None:
    """Slots and load of a training line, by at most GROUPS groups of neighbouring layers; None
    without MoE layers.
    """
    layers = line.get("layers") or []
    if not layers:
        return None
    slots = len(layers[0].get("slot_load", ())) or None
    groups = []
    for part in np.array_split(np.arange(len(layers)), min(GROUPS, len(layers))):
        members = [layers[index] for index in part]
        dropped = sum(layer.get("dropped", 0) for layer in members)
        choices = sum(sum(layer["load"]) for layer in members)
        devices = [layer["device_load"] for layer in members if "device_load" in layer]
        groups.append(
            {
                "layers": [layer["layer"] for layer in members],
                "load_max_over_mean": max(load_max_over_mean(layer["load"]) for layer in members),
                "device_load_max_over_mean": max(map(load_max_over_mean, devices), default=None),
                "dead_experts": sum(layer["dead_experts"] for layer in members),
                "dropped": dropped,
                "dropped_fraction": dropped / max(choices, 1),
            }
        )
    return {
        "step": line["step"],
        "experts": len(layers[0]["load"]),
        "slots": slots,
        "slots_per_rank": slots and slots // ranks,
        "dropped_fraction": line.get("dropped_fraction"),
        "groups": groups,
    }


def slow_process(
    told: list[dict[str, Any]], recent: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    """Which of several processes keeps the others waiting, and why, in a sentence.

    The seconds of a step are the same for all, as they wait for one another within it. What is a
    process's own is the time in which it prepares its batch, and the load of its experts.
    """
    if len(told) < 2 or len(told) < told[0]["processes"]:
        return None
    steps = [said["step_seconds"] for said in told if said["step_seconds"]]
    found: list[tuple[int, str]] = []
    if steps:
        own = np.array([_data_seconds(said) for said in told])
        slowest = int(own.argmax())
        extra = own[slowest] - float(np.median(np.delete(own, slowest)))
        if extra > SLOW_DATA * max(steps):
            found.append(
                (slowest, f"by itself: it takes {extra:.2g} s per step longer for its batch")
            )
    load = process_load(recent, len(told))
    if load is not None and (times := load_max_over_mean(load)) > 1 + MORE_LOAD:
        found.append((int(np.argmax(load)), f"by load: its experts have {times:.2f} x the mean"))
    if not found:
        why = "no process waits for its data or has more load; a slow device shows in neither"
        return {"process": None, "text": why}
    text = "; ".join(f"process {told[index]['process']} {why}" for index, why in found)
    return {"process": told[found[0][0]]["process"], "text": text}


def process_load(recent: Sequence[dict[str, Any]], processes: int) -> np.ndarray | None:
    """Choices for the experts of each process, float64 [processes]; None where devices cannot be
    told apart by process. Lines of another number of devices than the newest are left out: the run
    has gone on with fewer processes, or with more.
    """
    loads = [
        layer["device_load"]
        for line in recent
        for layer in line.get("layers", ())
        if "device_load" in layer
    ]
    loads = [load for load in loads if len(load) == len(loads[-1])]
    if not loads or len(loads[0]) % processes:
        return None
    return np.sum(np.array(loads, np.float64), axis=0).reshape(processes, -1).sum(-1)


def _data_seconds(said: dict[str, Any]) -> float:
    """Seconds per step in which a process prepared its batch."""
    done = steps_done(said) - (said["from_step"] or 0)
    return said["seconds"].get("data", 0.0) / max(done, 1)


def _process(said: dict[str, Any], now: float) -> dict[str, Any]:
    ours = said["host"] == socket.gethostname()
    silent = now - said["beat"]
    if said["ended"]:
        state = "ended"
    elif ours and _gone(said["pid"]):
        state = "dead"
    else:
        state = "live" if silent <= SILENT else "silent"
    names = ("process", "host", "pid", "step", "phase", "step_seconds", "seconds", "attempt")
    told = {name: said[name] for name in names}
    return {**told, "state": state, "phase_age": now - said["since"], "silent": silent}


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        return False
    return False


def _state(processes: list[dict[str, Any]], accounts: list[dict[str, Any]]) -> str:
    states = {process["state"] for process in processes}
    if not accounts:
        return "unknown"  # of an earlier version
    if "live" in states:
        return "running" if states <= {"live", "ended"} else "running, but not all of it"
    if "silent" in states:
        return "silent"
    return "ended" if accounts[-1]["ended"] else "dead"


def _newest_step(recent: deque[dict[str, Any]]) -> int:
    return recent[-1]["step"] if recent else 0


def _read_metrics(path: Path) -> deque[dict[str, Any]]:
    """The newest training lines."""
    lines = iter_metrics(path) if path.exists() else ()
    training = (line for line in lines if "event" not in line and "val_loss" not in line)
    return deque(training, maxlen=RECENT)


def _checkpoint(folder: Path, now: float) -> dict[str, Any] | None:
    """The newest checkpoint that counts, its age in seconds, and the experts of each rank in its
    first MoE layer.
    """
    steps = saved_steps(folder)
    if not steps:
        return None
    step = steps[-1]
    places = [step_path(folder, step, suffix) for suffix in (COMMITTED, "", ".replaced")]
    return {
        "step": step,
        "age": now - next(path for path in places if path.exists()).stat().st_mtime,
        "assignment": _assignment(step_path(folder, step)),
    }


def _assignment(step: Path) -> dict[str, Any] | None:
    """Experts by rank in the first layer, and whether the other layers are the same; None where
    the checkpoint is being replaced, or its model has no experts.
    """
    for folder in (step, step.with_suffix(".partial")):
        if (folder / "meta.json").exists():
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            table = Placement.from_json(meta["placement"])
            layers = table.physical_to_logical
            if not len(layers):
                return None
            return {
                "ranks": layers[0].reshape(table.ranks, -1).tolist(),
                "same_in_all_layers": bool((layers == layers[0]).all()),
            }
    return None
