"""The report of a run: RUN_DIR/report.html, one file with its pictures inside, and the pictures as
RUN_DIR/plots/*.png.

Runs as `moe-jax report RUN_DIR` and at the end of training, from the files of the run directory
alone.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.errors import UserError
from moe_jax.placement.table import Placement
from moe_jax.profiling.memory import DEVICE_BYTE_KINDS
from moe_jax.tracking.alerts import spans
from moe_jax.tracking.history import (
    History,
    decisions,
    finite,
    last,
    median,
    read_history,
    running_mean,
)
from moe_jax.tracking.metrics import FILE_NAME, NATS
from moe_jax.utils.files import replace_bytes, replace_text
from moe_jax.utils.units import binary, si

NOTES = {
    "loss": "Loss without the auxiliary ones; the faint line is every logged step.",
    "expert_load": "Each row is an expert, each panel a MoE layer. White is an even share, red "
    "more, blue less, black no token at all.",
    "load_imbalance": "max_violation, the largest load over the mean load, less 1: 0 is even.",
    "router_entropy": "Entropy of the router's probabilities; the dashed line is its maximum, at "
    "which the router prefers no expert.",
    "drop_rate": "Share of the (token, choice) assignments that found no room in their pool.",
    "device_load": "Load of the busiest device over the mean device's, in choices of its experts, "
    "dropped ones included: 1 is even.",
    "placement_effect": "Rows of each rank over their mean, all layers together; max/mean is a "
    "layer's, averaged over layers.",
    "link_traffic": "Rows per step between ranks in the newest window, all layers together: red is "
    "more than the mean link, blue less.",
    "replica_use": "How replicas shared their expert's choices, before drops; the number in a "
    "part is the rank that holds it.",
    "throughput": "The first step of each process includes compilation and is left off the scale "
    "and out of the medians.",
    "forecasts": "Held-out series at the newest validation, the first ones of the batch.",
    "gradient": "Global norm over all parameters, before clipping, and the learning rate of the "
    "schedule.",
}
NEWEST_ROWS = 50  # of decisions and of alerts
STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #5c5c5c; --page: #fff; --line: #d8d8d8;
  --panel: #f6f6f6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --soft: #a8a8a8; --page: #16181b;
  --line: #3a3d41; --panel: #202327; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 500; color: var(--soft); } .bytes td, .bytes th { text-align: right;
  white-space: nowrap; }
figure { margin: 1.5rem 0; } img { width: 100%; min-width: 36rem; height: auto; background: #fff;
  border-radius: 6px; }
figcaption { color: var(--soft); font-size: .9rem; }
pre { background: var(--panel); padding: .8rem; overflow-x: auto; font-size: .85rem;
  border-radius: 6px; }
summary { cursor: pointer; margin-top: 1rem; }
"""


def write_report(run_dir: Path) -> Path:
    """Draws a run's figures into plots/ and writes its report.html; returns the report's path.

    Files are replaced whole, so a reader never sees half of one. Raises UserError where the
    directory, config.yaml, environment.json or metrics.jsonl is missing or damaged, or no step was
    logged.
    """
    if not run_dir.is_dir():
        raise UserError(
            f"{run_dir} is not a run directory: give the directory that `moe-jax train` wrote."
        )
    history = read_history(run_dir / FILE_NAME)
    config = _read_text(run_dir / "config.yaml")
    environment = _read_environment(run_dir / "environment.json")
    from moe_jax.tracking.figures.forecasts import forecast_figures
    from moe_jax.tracking.figures.placement import placement_figures
    from moe_jax.tracking.figures.training import (
        all_figures,
    )  # matplotlib takes most of a second, which other commands need not wait

    pictures = {}
    (run_dir / "plots").mkdir(exist_ok=True)
    for name, figure in (
        all_figures(history, environment.get("loss_unit", NATS))
        | placement_figures(history, _newest_table(run_dir, history))
        | forecast_figures(run_dir)
    ).items():
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        pictures[name] = picture.getvalue()
        replace_bytes(run_dir / "plots" / f"{name}.png", pictures[name])
    path = run_dir / "report.html"
    replace_text(path, _page(run_dir.resolve().name, history, config, environment, pictures))
    return path


def _page(
    name: str,
    history: History,
    config: str,
    environment: dict[str, Any],
    pictures: dict[str, bytes],
) -> str:
    figures = "".join(
        f'<figure><div class="wide"><img alt="{key}" '
        f'src="data:image/png;base64,{base64.b64encode(picture).decode()}"></div>'
        f"<figcaption>{html.escape(NOTES[key])}</figcaption></figure>\n"
        for key, picture in pictures.items()
    )
    no_experts = (
        ""
        if history.layers
        else "<p>This model has no MoE layer, so there is no load, entropy or drop rate to "
        "show.</p>"
    )
    rows = "".join(
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(value)}</td></tr>\n"
        for key, value in _key_figures(history, environment)
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(name)} - moe_jax report</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Run {html.escape(name)}</h1>
<div class="wide"><table>{rows}</table></div>
<h2>Bytes on each device</h2>
{_bytes_table(environment.get("bytes_per_device", {}))}
<h2>Over training</h2>
{no_experts}{figures}
{_placement_table(decisions(history.events))}{_alerts_table(spans(history.events))}
<details><summary>Configuration</summary><pre>{html.escape(config)}</pre></details>
<details><summary>Environment</summary>
<pre>{html.escape(json.dumps(environment, indent=2))}</pre></details>
</body>
</html>
"""


def _key_figures(history: History, environment: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows of the first table, unescaped."""
    speed, mfu = median(history.steady("tokens_per_second")), median(history.steady("mfu"))
    parameters, mesh, empty = (
        environment.get("parameters", {}),
        environment.get("mesh", {}),
        environment.get("empty_slots_per_layer"),
    )
    rate, unit = environment.get("matmul_flops_per_second"), environment.get("loss_unit", NATS)
    ceiling = "".join(
        f", {environment[key]}" for key in ("matmul_shape", "matmul_dtype") if key in environment
    )
    ce = history.column("ce_loss")
    smooth, window = running_mean(ce)
    mean = f" (mean of the last {window} logged: {_number(last(smooth))})" if window > 1 else ""
    drops = (
        f", with {_number(history.drop_share(), '.2%')} of expert assignments dropped"
        if history.layers
        else ""
    )
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.items())
    rows = [
        (
            "Final training loss",
            f"{_number(last(ce))} {unit} at step {last(history.column('step')):,.0f}{mean}",
        ),
        ("Best validation loss", _best_validation(history.validation, unit)),
        ("Tokens", _number(last(history.column("tokens")), ",.0f")),
        ("Throughput", f"median {_number(speed, ',.0f')} tokens/s{drops}"),
        (
            "MFU",
            f"median {_number(mfu, '.1%')} of {si(rate, 'FLOP/s')}, the matmul rate measured at "
            f"the start{ceiling}",
        ),
        (
            "Parameters",
            f"{si(parameters.get('total'))} in all, {si(parameters.get('active'))} active for a "
            f"token",
        ),
        (
            "Devices",
            f"{len(environment.get('devices', []))} {environment.get('platform', '')}; mesh {axes}",
        ),
        ("Skipped steps", _number(last(history.column("skipped")), ",.0f")),
    ]
    if empty:
        rows.append(
            (
                "Empty expert slots",
                f"{empty} a layer, because the expert axis does not divide the experts",
            )
        )
    return rows


def _best_validation(validation: dict[str, np.ndarray], unit: str) -> str:
    losses = validation.get("val_loss", np.zeros(0))
    if not finite(losses).size:
        return "not measured"
    best = int(np.nanargmin(losses))
    return f"{losses[best]:.4f} {unit} at step {validation['step'][best]:,.0f}"


def _bytes_table(bytes_per_device: dict[str, dict[str, int]]) -> str:
    """Bytes of each kind by device; neighbours that hold the same share a row, so a pod's table
    stays short.
    """
    if not bytes_per_device:
        return "<p>environment.json names none.</p>"
    header = "".join(f"<th>{kind.replace('_', ' ')}</th>" for kind in DEVICE_BYTE_KINDS)
    rows = []
    for held, group in itertools.groupby(
        bytes_per_device.items(),
        key=lambda item: [item[1].get(kind, 0) for kind in DEVICE_BYTE_KINDS],
    ):
        devices = [device for device, _ in group]
        who = devices[0] if len(devices) == 1 else f"{devices[0]} to {devices[-1]}, each"
        cells = "".join(f"<td>{binary(count)}</td>" for count in [*held, sum(held)])
        rows.append(f"<tr><th>{html.escape(who)}</th>{cells}</tr>")
    return (
        f'<div class="wide"><table class="bytes"><tr><th>device</th>{header}<th>sum</th></tr>\n'
        + "\n".join(rows)
        + "</table></div>"
    )


def _placement_table(made: list[dict[str, Any]]) -> str:
    """What was decided about the experts' places, newest last."""
    rows = []
    for decision in made[-NEWEST_ROWS:]:
        realised, seconds = decision["realised"], decision.get("seconds")
        rows.append(
            [
                f"{decision['step']:,}",
                "moved" if decision["accepted"] else "refused",
                f"{decision['strategy']}: {decision['why']}",
                f"{decision['predicted_gain']:.1%}",
                f"{realised['realised_gain']:.1%}" if realised else "not measured",
                f"{decision['moves']:,}",
                binary(decision["bytes"]),
                f"{decision['seconds_estimated']:.3g} estimated"
                if seconds is None
                else f"{seconds:.3g}",
            ]
        )
    header = [
        "step",
        "decision",
        "why",
        "predicted gain",
        "realised gain",
        "moves",
        "bytes",
        "seconds",
    ]
    return _table("Placement decisions", header, rows, len(made))


def _alerts_table(alerts: list[dict[str, Any]]) -> str:
    rows = [
        [
            f"{alert['step']:,}",
            alert["text"],
            "not over" if alert["until"] is None else f"{alert['until']:,}",
        ]
        for alert in alerts[-NEWEST_ROWS:]
    ]
    return _table("Alerts", ["step", "what was seen", "over at step"], rows, len(alerts))


def _table(title: str, header: list[str], rows: list[list[str]], total: int) -> str:
    """A titled table of the newest rows of `total`; nothing where there are none."""
    if not rows:
        return ""
    some = f" (the newest {len(rows):,} of {total:,})" if len(rows) < total else ""
    lines = [
        "".join(f"<th>{name}</th>" for name in header),
        *("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows),
    ]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<h2>{title}{some}</h2>\n<div class="wide"><table>{body}</table></div>\n'


def _newest_table(run_dir: Path, history: History) -> Placement | None:
    """The newest checkpoint's placement, where slots outnumber experts and choices by slot were
    logged.
    """
    if not any(load_LP.shape[1] > history.load_NLE.shape[2] for load_LP in history.slot_load):
        return None
    from moe_jax.checkpoint.expert_layout import saved_meta
    from moe_jax.checkpoint.manager import Checkpoints  # brings Orbax
    from moe_jax.placement.table import Placement

    saved = saved_meta(Checkpoints(run_dir / "checkpoints", 1, 0), None, fallback=True)
    return None if saved is None else Placement.from_json(saved[1]["placement"])


def _number(value: float, form: str = ".4f") -> str:
    return "not measured" if math.isnan(value) else format(value, form)


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: give the directory of a run that `moe-jax train` has started."
        )
    return path.read_text(encoding="utf-8")


def _read_environment(path: Path) -> dict[str, Any]:
    try:
        environment = json.loads(_read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): restore the file.") from error
    if not isinstance(environment, dict):
        raise UserError(f"{path} holds no JSON object: restore the file.")
    return environment
