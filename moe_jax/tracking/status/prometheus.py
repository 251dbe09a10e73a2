"""Metrics of a run for Prometheus, served while it trains: `moe-jax train --metrics-port PORT`.

Each scrape reads what the run has written since the last one, so the training loop does nothing for
it. The number of series does not grow with the model: layers are told in at most 8 groups.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric

from moe_jax.errors import UserError
from moe_jax.runtime.distributed import is_first
from moe_jax.tracking.follow import FollowedRun
from moe_jax.tracking.metrics import is_number
from moe_jax.tracking.process_files import all_accounts, read_attempts, read_processes
from moe_jax.tracking.run_dir import read_run_config
from moe_jax.tracking.status.gather import experts
from moe_jax.tracking.status.goodput import goodput
from moe_jax.utils.units import ranges

# Fields of a training line.
FIELDS = {
    "loss": "What is minimised.",
    "ce_loss": "Cross-entropy, nats per token.",
    "step": "Optimizer steps taken.",
    "step_seconds": "Seconds per step.",
    "tokens_per_second": "Tokens per second, of all devices.",
    "mfu": "Model FLOPs utilisation, a fraction.",
    "grad_norm": "Global gradient norm before clipping.",
    "dropped_fraction": "Dropped (token, choice) assignments, a fraction.",
}
GROUP_FIELDS = {
    "load_max_over_mean": "Load of the fullest expert over the mean, largest of the layers.",
    "device_load_max_over_mean": "Load of the busiest device over the mean, largest of the layers.",
    "dead_experts": "Experts without a token, of all the layers.",
    "dropped": "Assignments dropped in the newest logged step, of all the layers.",
}


class RunCollector:
    """What a scrape gets of a run: a collector, as prometheus-client calls it."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._run = FollowedRun(run_dir)
        self._lock = threading.Lock()  # scrapes may overlap

    def collect(self) -> Iterator[Metric]:
        """The metrics of the newest training line, and the goodput."""
        with self._lock:
            self._run.read()
            line = self._run.training or {}
        for name, text in FIELDS.items():
            if is_number(line.get(name)):
                yield GaugeMetricFamily(f"moe_jax_{name}", text, value=line[name])
        if line:
            ranks = read_run_config(self.run_dir).mesh.expert
            yield from _group_metrics(experts(line, ranks))
        yield from self._time_metrics()

    def _time_metrics(self) -> Iterator[Metric]:
        told = read_processes(self.run_dir)
        accounts = all_accounts(read_attempts(self.run_dir), told)
        if not accounts:
            return
        account = goodput(accounts)
        if account.share is not None:
            text = "Time in productive steps over the time of the run."
            yield GaugeMetricFamily("moe_jax_goodput", text, value=account.share)
        spent = GaugeMetricFamily(
            "moe_jax_time_seconds", "Time of the run by what it was spent on.", labels=["cause"]
        )
        for cause, seconds in {"productive": account.productive, **account.lost}.items():
            spent.add_metric([cause], seconds)
        yield spent
        if told:
            silence = time.time() - min(said["beat"] for said in told)
            text = "Seconds since the quietest process spoke."
            yield GaugeMetricFamily("moe_jax_silence_seconds", text, value=silence)


def _group_metrics(found: dict[str, Any] | None) -> Iterator[Metric]:
    for name, text in GROUP_FIELDS.items() if found else ():
        assert found is not None
        family = GaugeMetricFamily(f"moe_jax_expert_{name}", text, labels=["layers"])
        for group in found["groups"]:
            if group[name] is not None:
                family.add_metric([ranges(group["layers"])], group[name])
        yield family


@contextmanager
def served_metrics(run_dir: Path, port: int, *, address: str = "0.0.0.0") -> Iterator[None]:
    """Serves the metrics of a run while the block runs, from the first process alone. Raises
    UserError for a port that cannot be had.
    """
    if not is_first():
        yield
        return
    registry = CollectorRegistry(auto_describe=False)
    collector: Any = RunCollector(run_dir)
    registry.register(collector)
    try:
        server, thread = start_http_server(port, address, registry)
    except OSError as error:
        raise UserError(
            f"--metrics-port {port} cannot be served ({error.strerror}): name a free port."
        ) from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
