"""The report: whole for every kind of run, escaped, self-contained, and with figures that say what
was logged.
"""

from __future__ import annotations

import base64
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.checkpoint.manager import Checkpoints
from moe_jax.errors import UserError
from moe_jax.placement.table import Placement
from moe_jax.tracking.figures.placement import placement_figures
from moe_jax.tracking.figures.training import all_figures, expert_load, load_imbalance
from moe_jax.tracking.history import read_history
from moe_jax.tracking.metrics import MetricsWriter
from moe_jax.tracking.report import write_report
from tests.support import monitored_run

ENVIRONMENT = {
    "devices": ["cpu:0", "cpu:1", "cpu:2"],
    "platform": "cpu",
    "git_commit": "<script>",
    "matmul_flops_per_second": 2.1e11,
    "matmul_shape": "1024x1024x1024",
    "parameters": {"total": 3_210_000, "active": 1_400_000},
    "mesh": {"data": 1, "expert": 3, "tensor": 1},
    "empty_slots_per_layer": 2,
    "bytes_per_device": {
        "0": {
            "dense_parameters": 1024,
            "expert_parameters": 2**20,
            "dense_optimizer": 0,
            "expert_optimizer": 0,
        },
        "1": {
            "dense_parameters": 1024,
            "expert_parameters": 2**20,
            "dense_optimizer": 0,
            "expert_optimizer": 0,
        },
        "2": {
            "dense_parameters": 512,
            "expert_parameters": 0,
            "dense_optimizer": 0,
            "expert_optimizer": 0,
        },
    },
}
MOE_FIGURES = ["expert_load", "load_imbalance", "router_entropy", "drop_rate"]


def training(step: int, layers: int, experts: int) -> dict:
    layer = {
        "load": [step + expert for expert in range(experts)],
        "max_violation": 0.5,
        "dead_experts": 0,
        "router_entropy": 0.9,
    }
    return {
        "step": step,
        "ce_loss": 6.0 / step,
        "grad_norm": 1.0 / step,
        "lr": 1e-3,
        "tokens": 64 * step,
        "tokens_per_second": 5.0 if step == 1 else 1000.0 + step,
        "mfu": 0.25,
        "kept": 99 if layers else 0,
        "dropped": 1 if layers else 0,
        "skipped": 0,
        "layers": [{"layer": index, **layer} for index in range(layers)],
    }


def make_run(
    run_dir: Path,
    *,
    steps: int = 4,
    layers: int = 2,
    experts: int = 4,
    validation: bool = True,
    changes: dict | None = None,
) -> Path:
    writer = MetricsWriter(run_dir)
    for step in range(1, steps + 1):
        writer.write(training(step, layers, experts) | (changes or {}))
        if validation:
            writer.write({"step": step, "val_loss": 2.5 + (step - 3) ** 2, "val_tokens": 10})
    writer.close()
    (run_dir / "config.yaml").write_text("name: a<b>&c\n")
    (run_dir / "environment.json").write_text(json.dumps(ENVIRONMENT))
    return run_dir


class Page(HTMLParser):
    """Collects a page's tags, addresses and table rows, and sees that every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("img", "meta"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1].append(data)


def test_report_of_a_whole_run(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "a<i>run")
    path = write_report(run_dir)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert path == run_dir / "report.html"
    assert {*MOE_FIGURES, "loss", "throughput", "gradient"} == {
        plot.stem for plot in (run_dir / "plots").iterdir()
    }
    # Nothing is fetched: every picture is inside, and is the one in plots/.
    pictures = [
        base64.b64decode(address.removeprefix("data:image/png;base64,"))
        for address in page.addresses
    ]
    assert sorted(pictures) == sorted(plot.read_bytes() for plot in (run_dir / "plots").iterdir())
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert "i" not in page.tags and "b" not in page.tags and "script" not in page.tags
    assert "name: a&lt;b&gt;&amp;c" in text and "&lt;script&gt;" in text
    assert not re.search(r"https?://", re.sub(r"base64,[^\"]*", "", text))
    assert not list(run_dir.rglob("*.part"))


def test_key_figures_and_bytes_are_those_of_the_run(tmp_path: Path) -> None:
    rows = Page(write_report(make_run(tmp_path)).read_text(encoding="utf-8")).rows
    facts = {row[0]: row[1] for row in rows if len(row) == 2}
    assert facts["Final training loss"] == "1.5000 nats/token at step 4"
    assert facts["Best validation loss"] == "2.5000 nats/token at step 3"
    assert facts["Tokens"] == "256"
    # The first line, with its compilation, is out of the median of 1002, 1003 and 1004.
    assert facts["Throughput"] == "median 1,003 tokens/s, with 1.00% of expert assignments dropped"
    assert (
        facts["MFU"]
        == "median 25.0% of 210 GFLOP/s, the matmul rate measured at the start, 1024x1024x1024"
    )
    assert facts["Parameters"] == "3.21 M in all, 1.4 M active for a token"
    assert facts["Devices"] == "3 cpu; mesh data 1 x expert 3 x tensor 1"
    assert facts["Empty expert slots"].startswith("2 a layer")
    assert ["0 to 1, each", "1.0 KiB", "1.0 MiB", "0 B", "0 B", "1.0 MiB"] in rows
    assert ["2", "512 B", "0 B", "0 B", "0 B", "512 B"] in rows


@pytest.mark.parametrize(
    ("run", "absent"),
    [
        ({"steps": 1}, []),
        ({"validation": False}, []),
        ({"layers": 0}, MOE_FIGURES),
        ({"steps": 1, "layers": 0, "validation": False}, MOE_FIGURES),
        ({"layers": 1, "experts": 1}, []),
        (
            {
                "changes": {
                    "ce_loss": math.nan,
                    "grad_norm": math.inf,
                    "mfu": None,
                    "tokens_per_second": math.nan,
                }
            },
            [],
        ),
    ],
)
@pytest.mark.filterwarnings("error")
def test_report_of_an_odd_run(tmp_path: Path, run: dict, absent: list[str]) -> None:
    text = write_report(make_run(tmp_path, **run)).read_text(encoding="utf-8")
    Page(text)
    drawn = {plot.stem for plot in (tmp_path / "plots").iterdir()}
    assert drawn == {*MOE_FIGURES, "loss", "throughput", "gradient"} - set(absent)
    assert ("has no MoE layer" in text) == bool(absent)
    assert ("expert assignments dropped" in text) == (not absent)
    assert (
        re.search(r"\bnan\b", re.sub(r"base64,[^\"]*|<details>.*", "", text, flags=re.DOTALL))
        is None
    )


def test_many_layers_show_twelve_and_say_so(tmp_path: Path) -> None:
    make_run(tmp_path, steps=2, layers=40, experts=3)
    history = read_history(tmp_path / "metrics.jsonl")
    figure = expert_load(history)
    panels = [ax.get_title(loc="left") for ax in figure.axes if ax.get_title(loc="left")]
    assert panels == [f"layer {layer}" for layer in (0, 4, 7, 11, 14, 18, 21, 25, 28, 32, 35, 39)]
    assert "12 of 40 MoE layers" in figure.get_suptitle()
    # Expert 2 of the last step has 4 of the layer's 9 tokens: 4 / 3 of an even share.
    assert "up to 1.33 times even (expert 2 of layer 0)" in figure.get_suptitle()
    assert len(load_imbalance(history).axes[0].lines) == 40


def test_lines_with_compilation_set_no_limits(tmp_path: Path) -> None:
    make_run(tmp_path)
    figure = all_figures(read_history(tmp_path / "metrics.jsonl"), "nats/token")["throughput"]
    low, high = figure.axes[0].get_ylim()
    assert 1000 < low < 1002 and 1004 < high < 1006


def test_second_report_replaces_the_first(tmp_path: Path) -> None:
    first = write_report(make_run(tmp_path)).read_bytes()
    assert write_report(tmp_path).read_bytes() == first


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "metrics.jsonl"])
def test_missing_file_is_one_sentence(tmp_path: Path, name: str) -> None:
    make_run(tmp_path, steps=1)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=re.escape(f"{name} does not exist")):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_no_run_directory_and_damaged_environment(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run directory"):
        write_report(tmp_path / "absent")
    make_run(tmp_path, steps=1)
    for damaged in ("{", "[]"):
        (tmp_path / "environment.json").write_text(damaged)
        with pytest.raises(UserError, match=r"environment\.json .*restore the file"):
            write_report(tmp_path)


PLACEMENT_FIGURES = {"device_load", "placement_effect", "link_traffic", "replica_use"}


def monitored(run_dir: Path, records: list[dict], table: Placement | None = None) -> Path:
    """A run with `records` and, with `table`, a checkpoint that has it."""
    make_run(run_dir, steps=0)
    (run_dir / "metrics.jsonl").unlink()
    writer = MetricsWriter(run_dir)
    for record in records:
        writer.write(record)
    writer.close()
    if table is not None:
        checkpoints = Checkpoints(run_dir / "checkpoints", 1, 0)
        checkpoints.save(6, {"x": jnp.zeros(1)}, {"placement": table.to_json()}, None)
        checkpoints.close()
    return run_dir


def titles(run_dir: Path, table: Placement | None) -> dict[str, str]:
    figures = placement_figures(read_history(run_dir / "metrics.jsonl"), table)
    return {
        name: figure.get_suptitle() or figure.axes[0].get_title(loc="left")
        for name, figure in figures.items()
    }


@pytest.mark.filterwarnings("error")
def test_report_of_a_run_with_placement(tmp_path: Path) -> None:
    run_dir = monitored(tmp_path / "run", monitored_run.whole_run(), monitored_run.TABLE)
    page = Page(write_report(run_dir).read_text(encoding="utf-8"))
    assert {plot.stem for plot in (run_dir / "plots").iterdir()} > PLACEMENT_FIGURES
    reason = "balanced: the gain pays <at once>"
    assert ["2", "moved", reason, "25.0%", "20.0%", "3", "3.0 MiB", "0.05"] in page.rows
    refused = "balanced: the gain of 1% is below placement.min_gain=0.02"
    assert [
        "3",
        "refused",
        refused,
        "25.0%",
        "not measured",
        "3",
        "3.0 MiB",
        "0.04 estimated",
    ] in page.rows
    assert ["2", "Layer 0: device 3 computes 5.00 times the mean load.", "4"] in page.rows
    assert ["4", "Layer 1: device 3 computes 5.00 times the mean load.", "not over"] in page.rows
    assert titles(run_dir, monitored_run.TABLE) == {
        "device_load": "Busiest device, averaged over layers: 1.26 times the mean load at first, "
        "1.26 times at the end",
        "placement_effect": "Load by device before and after the move: 20% less from step 2 "
        "(predicted 25% less)",
        "link_traffic": "Links at step 6: 0 to 1 is busiest, 30 rows (1.50 x mean); 40% travel",
        "replica_use": "4 replicated experts took 70% of the choices at step 6; the fullest "
        "replica 1.00 x even",
    }


def test_pictures_only_of_what_was_recorded(tmp_path: Path) -> None:
    run_dir = monitored(
        tmp_path / "run",
        [*monitored_run.whole_run()[:2], monitored_run.decision(2, accepted=False)],
    )
    assert titles(run_dir, None).keys() == {"device_load"}
    # Another table than the one that the line's choices went by: experts 1 and 3 have the replicas.
    other = Placement(np.array([[0, 1, 3, 2, 1, 3]] * 2), 4, 2)
    assert titles(run_dir, other).keys() == {"device_load"}
    text = write_report(monitored(tmp_path / "first", [monitored_run.training(1)])).read_text(
        encoding="utf-8"
    )
    assert "Placement decisions" not in text and "Alerts" not in text


@pytest.mark.filterwarnings("error")
def test_many_ranks_layers_and_decisions_are_drawn(tmp_path: Path) -> None:
    ranks, layers = 24, 9
    records: list[dict] = []
    for step in range(1, 70):
        line, move = monitored_run.training(step), monitored_run.decision(step)
        line["layers"] = [
            line["layers"][0] | {"layer": layer, "device_load": list(range(1, 49))}
            for layer in range(layers)
        ]
        for when in ("before", "after"):
            move["predicted"][f"device_load_{when}"] = list(range(1, ranks + 1))
        records += [line, move, monitored_run.alert(step, step)]
    sent = [[(source + 1) * (to % 3) for to in range(ranks)] for source in range(ranks)]
    records.append(
        {"event": "traffic", "step": 69, "steps": 1, "layers": [{"layer": 0, "sent": sent}]}
    )
    run_dir = monitored(tmp_path / "run", records)
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert page.count("(the newest 50 of 69)") == 2
    found = titles(run_dir, None)
    assert found["placement_effect"] == "Load by device before and after the newest 4 of 69 moves"
    assert found["link_traffic"].startswith("Links at step 69: 23 to 2 is busiest, 48 rows")


def test_matplotlib_waits_until_a_report_is_drawn() -> None:
    code = "import sys, moe_jax.tracking.report; raise SystemExit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
