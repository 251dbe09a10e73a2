"""Metrics as Prometheus gets them over HTTP: values, a bounded number of series, a busy port."""

from __future__ import annotations

import socket
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from moe_jax.cli import main
from moe_jax.errors import UserError
from moe_jax.tracking.status.prometheus import served_metrics
from tests.support import ROOT, monitored_run
from tests.support.command import call
from tests.tracking.status.test_status import told, write
from tests.tracking.test_watch import add, begin


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def scrape(port: int) -> dict[tuple[str, ...], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as page:
        families = text_string_to_metric_families(page.read().decode())
        return {
            (sample.name.removeprefix("moe_jax_"), *sample.labels.values()): sample.value
            for family in families
            for sample in family.samples
        }


def test_a_scrape_gets_what_the_run_has_written(tmp_path: Path) -> None:
    layer = monitored_run.training(1)["layers"][0]
    layers = [{**layer, "layer": index, "dead_experts": 1} for index in range(48)]
    run, port = tmp_path / "mine", free_port()
    with served_metrics(run, port, address="127.0.0.1"):
        assert scrape(port) == {}  # before it begins
        begin(run, [monitored_run.training(4, loss=2.5, layers=layers)])
        write(run, told(0), told(1))
        seen = scrape(port)
        assert seen["loss",] == 2.5 and seen["step",] == 4 and seen["dropped_fraction",] == 0.05
        assert seen["goodput",] == pytest.approx(19 / 60)
        assert seen["time_seconds", "start"] == 40 and seen["time_seconds", "productive"] == 19
        assert seen["expert_dropped", "0-5"] == 30 and seen["expert_dead_experts", "42-47"] == 6
        assert seen["expert_load_max_over_mean", "0-5"] == 1.6
        assert sum(name.startswith("expert_") for name, *_ in seen) == 4 * 8
        add(run, [monitored_run.training(5)])
        assert scrape(port)["step",] == 5
    with pytest.raises(OSError):
        scrape(port)


def test_a_busy_port_is_refused_before_anything_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*arguments: object, **options: object) -> None:
        pytest.fail("training began")

    monkeypatch.setattr(main, "run_training", train)
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        port = listener.getsockname()[1]
        config, run = ROOT / "configs" / "tiny.yaml", tmp_path / "run"
        assert call("train", config, "--run-dir", run, "--metrics-port", port) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"moe-jax: --metrics-port {port} cannot be served (Address already")
        with pytest.raises(UserError), served_metrics(run, port):
            pass
    assert not run.exists()
