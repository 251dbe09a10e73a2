"""Alerts: once when a limit is passed, once when it is over, silent within it, and read back as
spans.
"""

from __future__ import annotations

import pytest

from moe_jax.config.schema import MonitorConfig
from moe_jax.tracking.alerts import CALM, Alerts, spans

OFF = {"device_load": 0, "max_violation": 0, "dead_experts": 0, "dropped": 0}


def line(
    step: int, device: int = 10, load: tuple[int, ...] = (5, 5, 5, 5), dropped: float = 0.0
) -> dict:
    """Layer 1 is even, layer 3 has `load` by expert and `device` rows on device 2, where each of
    four devices has ten if even.
    """
    even = {
        "layer": 1,
        "load": [5, 5, 5, 5],
        "device_load": [10] * 4,
        "max_violation": 0.0,
        "dead_experts": 0,
        "dropped": 0,
    }
    violation = max(load) / (sum(load) / 4) - 1
    other = {
        "layer": 3,
        "load": list(load),
        "device_load": [(40 - device) / 3] * 2 + [device, (40 - device) / 3],
    }
    other |= {
        "max_violation": violation,
        "dead_experts": load.count(0),
        "dropped": 7,
        "dropped_to": [0, 7],
    }
    return {"step": step, "dropped_fraction": dropped, "layers": [even, other]}


@pytest.mark.parametrize(
    ("what", "limit", "bad", "value", "layer", "words"),
    [
        (
            "device_load",
            2.0,
            {"device": 30},
            3.0,
            3,
            "Layer 3: device 2 is asked for 3.00 times the mean load (limit",
        ),
        (
            "max_violation",
            1.5,
            {"load": (1, 17, 1, 1)},
            2.4,
            3,
            "Layer 3: expert 1 has 3.40 times the mean load, max violation 2.40 (limit",
        ),
        (
            "dead_experts",
            0.25,
            {"load": (0, 10, 10, 0)},
            0.5,
            3,
            "Layer 3: 2 of 4 experts got no token (limit monitor.dead_experts=0.25)",
        ),
        (
            "dropped",
            0.1,
            {"dropped": 0.2},
            0.2,
            None,
            "20.0% of the expert assignments were dropped, most in layer 3 on their way to rank 1",
        ),
    ],
)
def test_an_alert_is_raised_once_and_is_over_after_calm_lines(
    what, limit, bad, value, layer, words
) -> None:
    alerts = Alerts(MonitorConfig(**OFF | {what: limit}))
    assert alerts.check(line(1)) == []
    (raised,) = alerts.check(line(2, **bad))
    assert raised | {"text": ""} == {
        "step": 2, "event": "alert", "what": what, "layer": layer, "value": pytest.approx(value),
        "limit": limit, "text": "",
    }  # fmt: skip
    assert words in raised["text"] and raised["text"].endswith(".")
    assert alerts.check(line(3, **bad)) == []
    # A line within the limit is not the end of it, if another beyond it follows.
    assert [alerts.check(line(step)) for step in range(4, 3 + CALM)] == [[]] * (CALM - 1)
    assert alerts.check(line(8, **bad)) == []
    events = [event for step in range(9, 9 + CALM) for event in alerts.check(line(step))]
    assert [(event["event"], event["step"], event["what"], event["layer"]) for event in events] == [
        ("alert_over", 8 + CALM, what, layer)
    ]
    assert f"(limit monitor.{what}={limit:g})" in events[0]["text"]
    assert [event["event"] for event in alerts.check(line(20, **bad))] == ["alert"]


def test_layers_are_apart_and_a_limit_itself_is_kept() -> None:
    alerts = Alerts(MonitorConfig(**OFF | {"device_load": 2.0}))
    assert alerts.check(line(1, device=20)) == []
    both = line(2, device=30)
    both["layers"][0]["device_load"] = [31, 3, 3, 3]
    assert [(event["layer"], event["value"]) for event in alerts.check(both)] == [
        (1, 3.1),
        (3, 3.0),
    ]


def test_zero_turns_a_limit_off() -> None:
    assert (
        Alerts(MonitorConfig(**OFF)).check(line(1, device=40, load=(20, 0, 0, 0), dropped=1.0))
        == []
    )


def test_defaults_are_silent_where_a_small_run_begins() -> None:
    # The largest figures of 300 steps of configs/tiny.yaml: early on its router is far from even.
    tiny = line(1, device=29, load=(79, 10, 1, 10), dropped=0.226)
    assert Alerts(MonitorConfig()).check(tiny) == []


def test_lines_without_the_newer_fields_are_checked_as_far_as_they_go() -> None:
    old = line(1, load=(20, 0, 0, 0), dropped=0.9)
    for layer in old["layers"]:
        del layer["device_load"]
    del old["layers"][1]["dropped_to"]
    found = Alerts(
        MonitorConfig(**OFF | {"device_load": 1.0, "max_violation": 2.0, "dropped": 0.5})
    ).check(old)
    assert [event["what"] for event in found] == ["max_violation", "dropped"]
    assert found[1]["text"].count("rank") == 0
    assert Alerts(MonitorConfig()).check({"step": 1, "dropped_fraction": 0.0, "layers": []}) == []


def test_spans_pair_begin_and_end() -> None:
    def event(step: int, name: str, layer: int | None = None) -> dict:
        return {"step": step, "event": name, "what": "device_load", "layer": layer}

    events = [
        event(1, "alert", 0),
        event(2, "alert", 1),
        event(3, "checkpoint"),
        event(4, "alert_over", 0),
        event(6, "resumed"),
    ]
    events += [event(7, "alert", 0), event(8, "alert_over", 1), event(9, "alert_over", 5)]
    assert [(span["step"], span["layer"], span["until"]) for span in spans(events)] == [
        (1, 0, 4),
        (2, 1, 8),
        (7, 0, None),
    ]
    assert "until" not in events[0]
