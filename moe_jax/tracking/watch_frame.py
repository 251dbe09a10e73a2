"""One frame of `moe-jax watch`: lines of text that fit the terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import ConsoleDimensions, Group
from rich.text import Text

from moe_jax.tracking.alerts import spans
from moe_jax.tracking.history import decisions, describe_links, measured_link_rows
from moe_jax.tracking.metrics import is_number, load_max_over_mean
from moe_jax.utils.units import duration, gibibytes

if TYPE_CHECKING:
    from moe_jax.tracking.follow import FollowedRun

RAMP, ASCII_RAMP = "▁▂▃▄▅▆▇█", ".:-=+*%#"
# Right of the load: titles and widths.
COLUMNS = (("violation", 11), ("dead", 6), ("busiest dev", 13), ("dropped", 9))
REPEAT = 3  # maximum number of characters per expert
TALL = 34  # a terminal with so many lines shows more decisions and alerts


def draw(run: FollowedRun, size: ConsoleDimensions, ascii_only: bool) -> Group:
    """The whole frame: no line is wider than the terminal, and it has two lines less."""
    if run.training is None:
        missing = "its first training line" if run.steps else "a run to start there"
        return Group(Text(f"Waiting for {missing}: {run.run_dir}"))
    ramp = ASCII_RAMP if ascii_only else RAMP
    top = [
        _progress(run, size.width, ascii_only),
        _loss(run, size.width, ramp),
        _speed(run, run.training),
    ]
    alerts = spans(run.events)
    bottom = _below(run, alerts, most=2 if size.height < TALL else 6)
    layers = run.training.get("layers", [])
    room = max(size.height - 2 - len(top) - len(bottom) - 3, 1)
    passed = {(alert["what"], alert["layer"]) for alert in alerts if alert["until"] is None}
    table = (
        _layer_table(layers, size.width, room, ramp, passed)
        if layers
        else [Text("This model has no MoE layer.")]
    )
    lines = [*top, Text(), *table, Text(), *bottom]
    for line in lines:
        line.truncate(size.width, overflow="crop")
        line.no_wrap = True
    return Group(*lines)


def sparkline(values: list[float], width: int, ramp: str = RAMP) -> str:
    """`values` as at most `width` characters, each for the mean of its part of them, scaled from
    the smallest to the largest mean.
    """
    if not values or width < 1:
        return ""
    means = np.array(
        [
            part.mean()
            for part in np.array_split(np.asarray(values, np.float64), min(width, len(values)))
        ]
    )
    low, spread = means.min(), np.ptp(means) or 1.0
    return "".join(ramp[int(level)] for level in np.round((means - low) / spread * (len(ramp) - 1)))


def load_bars(load: list[int], width: int, ramp: str = RAMP) -> str:
    """Load by expert as at most `width` characters, relative to the largest; x marks an expert
    without a token.

    If there are few experts, each gets up to REPEAT characters. If there are more experts than
    characters, each character shows the largest of several.
    """
    counts = np.asarray(load, np.float64)
    shares = np.array(
        [part.max() for part in np.array_split(counts, min(max(width, 1), counts.size))]
    )
    levels = np.ceil(shares / max(shares.max(), 1.0) * len(ramp)).astype(int)
    repeat = max(1, min(REPEAT, width // counts.size))
    return "".join((ramp[level - 1] if level else "x") * repeat for level in levels)


def _progress(run: FollowedRun, width: int, ascii_only: bool) -> Text:
    steps, share = run.steps or run.step, run.step / max(run.steps or run.step, 1)
    left = (
        ""
        if run.step_seconds is None or run.step >= steps
        else f"  about {duration(run.step_seconds * (steps - run.step))} left"
    )
    before, after = (
        f"{run.run_dir.resolve().name}  step {run.step:,}/{steps:,} ",
        f" {share:.0%}{left}",
    )
    room = max(min(width - len(before) - len(after), 60), 0)
    done = int(room * min(share, 1.0))
    full, empty = ("#", "-") if ascii_only else ("█", "░")
    return Text.assemble(
        (before, "bold"), (full * done, "green"), (empty * (room - done), "dim"), after
    )


def _loss(run: FollowedRun, width: int, ramp: str) -> Text:
    assert run.training is not None
    before = f"loss {_figure(run.training.get('ce_loss'), '.4f')} "
    after = (
        f"  validation {_figure(run.validation['val_loss'], '.4f')} at step "
        f"{run.validation['step']:,}"
        if run.validation
        else ""
    )
    return Text.assemble(
        before,
        (sparkline(run.losses, min(width - len(before) - len(after), 100), ramp), "cyan"),
        after,
    )


def _speed(run: FollowedRun, line: dict[str, Any]) -> Text:
    dropped = (
        f" with {_figure(line.get('dropped_fraction'), '.2%')} dropped"
        if line.get("layers")
        else ""
    )
    saved = "" if run.checkpoint is None else f"  saved: {run.checkpoint:,}"
    rate, mfu, norm = (
        _figure(line.get("tokens_per_second"), ",.0f"),
        _figure(line.get("mfu"), ".1%"),
        _figure(line.get("grad_norm"), ".3g"),
    )
    skipped = f"  {line['skipped']:,} skipped" if line.get("skipped") else ""
    return Text(f"{rate} tokens/s{dropped}  MFU {mfu}  gradient {norm}{saved}{skipped}")


def _layer_table(
    layers: list[dict[str, Any]],
    width: int,
    room: int,
    ramp: str,
    passed: set[tuple[str, int | None]],
) -> list[Text]:
    """A header and one line per layer; if there are more than `room`, the least even layers."""
    shown = layers
    if len(layers) > room:
        shown = sorted(
            layers,
            key=lambda layer: (_device_ratio(layer) or 0.0, layer["max_violation"]),
            reverse=True,
        )[:room]
        shown = sorted(shown, key=lambda layer: layer["layer"])
    bars = max(
        min(width - 7 - sum(wide for _, wide in COLUMNS), max(REPEAT * len(layers[0]["load"]), 32)),
        4,
    )
    some = f", {len(shown)} of {len(layers)} layers" if len(shown) < len(layers) else ""
    name = f"load by expert{some}"[:bars]
    lines = [
        Text(
            f"layer  {name:<{bars}}" + "".join(f"{title:>{wide}}" for title, wide in COLUMNS),
            style="dim",
        )
    ]
    for layer in shown:
        number, ratio = layer["layer"], _device_ratio(layer)
        cells = (
            (_figure(layer["max_violation"], ".2f"), "max_violation"),
            (str(layer["dead_experts"]), "dead_experts"),
            (
                _figure(ratio, ".2f")
                + ("" if ratio is None else f" ({int(np.argmax(layer['device_load']))})"),
                "device_load",
            ),
            (
                _figure(
                    layer["dropped"] / max(sum(layer["load"]), 1) if "dropped" in layer else None,
                    ".1%",
                ),
                "dropped",
            ),
        )
        text = Text.assemble(
            f"{number:>5}  ", (f"{load_bars(layer['load'], bars, ramp):<{bars}}", "blue")
        )
        for (cell, what), (_, wide) in zip(cells, COLUMNS, strict=True):
            text.append(f"{cell:>{wide}}", style="red" if (what, number) in passed else "")
        lines.append(text)
    return lines


def _device_ratio(layer: dict[str, Any]) -> float | None:
    return load_max_over_mean(layer["device_load"]) if "device_load" in layer else None


def _below(run: FollowedRun, alerts: list[dict[str, Any]], most: int) -> list[Text]:
    """Links, the newest decisions, the current alerts, and the state of the run."""
    lines = []
    if run.traffic:
        lines.append(
            Text(
                f"links   {describe_links(measured_link_rows(run.traffic))} (step "
                f"{run.traffic['step']:,})"
            )
        )
    lines += [_decision(decision) for decision in decisions(run.events)[-most:]]
    now = [alert for alert in alerts if alert["until"] is None]
    lines += [
        Text(f"alert   step {alert['step']:,}: {alert['text']}", style="red")
        for alert in now[-most:]
    ]
    others, over = max(len(now) - most, 0), len(alerts) - len(now)
    if others or over or not now:
        counts = f"{others} more active" if others else "none active" if not now else ""
        lines.append(
            Text(
                "alerts  " + ", ".join(filter(None, (counts, f"{over} over" if over else ""))),
                style="dim",
            )
        )
    if run.over:
        how = "ended" if run.step >= (run.steps or 0) else "stopped (continue with --resume)"
        lines.append(
            Text(f"The run has {how}; report: {run.run_dir / 'report.html'}", style="bold")
        )
    elif run.quiet is not None:
        lines.append(
            Text(
                f"No new line for {duration(run.quiet)}: a long step, or the run was killed "
                f"(continue with --resume).",
                style="yellow",
            )
        )
    else:
        lines.append(Text("Ctrl-C stops watching; the run continues.", style="dim"))
    return lines


def _decision(decision: dict[str, Any]) -> Text:
    step, realised = decision["step"], decision["realised"]
    if not decision["accepted"]:
        return Text(f"stays   step {step:,}: {decision['why']}")
    measured = f"{realised['realised_gain']:.1%} realised" if realised else "not yet measured"
    took = "" if decision.get("seconds") is None else f", {decision['seconds']:.2g} s"
    gain = f"gain {decision['predicted_gain']:.1%} predicted, {measured}"
    return Text(
        f"moved   step {step:,}: {gain}; {decision['moves']:,} moves, "
        f"{gibibytes(decision['bytes'])}{took}"
    )


def _figure(value: Any, form: str) -> str:
    """A number as text; - if the line has none, or one that is not finite."""
    return format(value, form) if is_number(value) and math.isfinite(value) else "-"
