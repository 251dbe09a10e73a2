"""`moe-jax watch`: what a frame says, that it fits, and that the file is followed as it grows, is
replaced and ends.
"""

from __future__ import annotations

import json
import os
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console, ConsoleDimensions

from moe_jax.cli import main
from moe_jax.errors import UserError
from moe_jax.tracking import watch as watching
from moe_jax.tracking import watch_frame
from moe_jax.tracking.follow import FollowedRun
from moe_jax.tracking.watch import watch
from moe_jax.tracking.watch_frame import draw, load_bars, sparkline
from moe_jax.utils.units import duration
from tests.support import monitored_run


def begin(run_dir: Path, records: list[dict], steps: int = 6) -> Path:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text(f"train: {{steps: {steps}}}\n")
    add(run_dir, records)
    return run_dir


def add(run_dir: Path, records: list[dict]) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def read(run_dir: Path) -> FollowedRun:
    run = FollowedRun(run_dir)
    run.read()
    return run


def frame(
    run: FollowedRun, width: int = 80, height: int = 24, ascii_only: bool = False
) -> list[str]:
    console = Console(file=StringIO(), width=width, height=height)
    console.print(draw(run, ConsoleDimensions(width, height), ascii_only))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_a_frame_says_what_the_records_say(tmp_path: Path) -> None:
    lines = frame(read(begin(tmp_path / "mine", monitored_run.whole_run())), width=120)
    text = "\n".join(lines)
    assert lines[0].startswith("mine  step 6/6 █") and lines[0].endswith(" 100%")
    assert lines[1].startswith("loss 1.0000 █") and lines[1].endswith("validation 1.5000 at step 6")
    assert lines[2] == "1,000 tokens/s with 5.00% dropped  MFU 25.0%  gradient 1  saved: 6"
    assert lines[5].split() == ["0", "███▂▂▂▆▆▆▄▄▄", "0.60", "0", "1.26", "(3)", "5.0%"]
    assert "links   0 to 1 is busiest, 30 rows (1.50 x mean); 40% travel (step 6)" in text
    assert "moved   step 2: gain 25.0% predicted, 20.0% realised; 3 moves, 3.0 MiB, 0.05 s" in text
    assert "stays   step 3: the gain of 1% is below placement.min_gain=0.02" in text
    assert "alert   step 4: Layer 1: device 3" in text and "alerts  1 over" in text
    assert lines[-1] == f"The run has ended; report: {tmp_path / 'mine' / 'report.html'}"


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 15), (200, 60)])
@pytest.mark.parametrize("layers", [1, 61])
def test_a_frame_fits_its_terminal(tmp_path: Path, width: int, height: int, layers: int) -> None:
    records = monitored_run.whole_run()
    for record in records:
        if "layers" in record and "event" not in record:
            record["layers"] = [
                record["layers"][0] | {"layer": number, "load": list(range(256))}
                for number in range(layers)
            ]
            record["layers"][-1]["device_load"] = [1, 9, 1, 1]
    lines = frame(read(begin(tmp_path / "r", records)), width, height)
    assert len(lines) <= height - 2 and max(map(len, lines)) <= width
    shown = [line.split()[0] for line in lines if line.strip()[:2].strip().isdigit()]
    assert str(layers - 1) in shown  # the least even one stays
    if len(shown) < layers:
        assert shown == sorted(shown, key=int) and (
            width < 80 or f"{len(shown)} of 61 layers" in "\n".join(lines)
        )


def test_ascii_where_the_terminal_has_nothing_else(tmp_path: Path) -> None:
    assert "\n".join(
        frame(read(begin(tmp_path / "r", monitored_run.whole_run())), ascii_only=True)
    ).isascii()


def test_lines_of_older_runs_and_dense_ones(tmp_path: Path) -> None:
    old = monitored_run.training(1)
    for layer in old["layers"]:
        del layer["device_load"], layer["slot_load"], layer["dropped_to"], layer["dropped"]
    assert frame(read(begin(tmp_path / "old", [old])))[5].split()[-2:] == ["-", "-"]
    lines = frame(
        read(begin(tmp_path / "dense", [monitored_run.training(1, layers=[], ce_loss=None)]))
    )
    assert (
        "This model has no MoE layer." in lines
        and "dropped" not in lines[2]
        and lines[1].startswith("loss - ")
    )


def test_only_whole_new_lines_are_read(tmp_path: Path) -> None:
    run_dir = begin(tmp_path / "r", [monitored_run.training(1), monitored_run.training(2)])
    run = read(run_dir)
    assert (
        run.step == 2 and run.losses == [6.0, 3.0] and run.step_seconds == 0.5
    )  # the first line's includes compilation
    text = json.dumps(monitored_run.training(3)) + "\n"
    for part, step in ((text[:40], 2), (text[40:-1], 2), ("\n", 3)):
        with (run_dir / "metrics.jsonl").open("a") as file:
            file.write(part)
        run.read()
        assert run.step == step
    # What has been read is not read again: damage done to it goes unseen.
    with (run_dir / "metrics.jsonl").open("r+b") as file:
        file.write(b"xxxx")
    add(run_dir, [monitored_run.training(4)])
    run.read()
    assert run.losses == [6.0, 3.0, 2.0, 1.5] and not run.over
    assert "about 1 s left" in frame(run)[0]


def test_a_resumed_run_is_read_anew_and_its_config_too(tmp_path: Path) -> None:
    run_dir = begin(tmp_path / "r", [*monitored_run.whole_run()])
    run = read(run_dir)
    assert run.over
    kept = [monitored_run.training(1), {"step": 1, "event": "resumed"}, monitored_run.training(2)]
    begin(tmp_path / "new", kept)
    (run_dir / "config.yaml").write_text("train: {steps: 50}\n")
    (tmp_path / "new" / "metrics.jsonl").replace(run_dir / "metrics.jsonl")
    run.read()
    assert (run.step, run.steps, run.losses, run.step_seconds, run.over) == (
        2,
        50,
        [6.0, 3.0],
        None,
        False,
    )
    (run_dir / "metrics.jsonl").unlink()  # --overwrite
    run.read()
    assert run.step == 0


def test_a_quiet_run_is_told_from_one_that_stopped(tmp_path: Path) -> None:
    run_dir = begin(tmp_path / "r", [monitored_run.training(1), monitored_run.training(2)])
    run = read(run_dir)
    assert run.quiet is None and "Ctrl-C stops watching" in frame(run)[-1]
    (run_dir / "report.html").write_text("")  # drawn by hand, while the run goes on
    assert not run.over
    past = time.time() - 100
    os.utime(run_dir / "metrics.jsonl", (past, past))
    os.utime(run_dir / "report.html", (past - 1, past - 1))
    assert not run.over and frame(run)[-1].startswith("No new line for 1 min 40 s")
    os.utime(run_dir / "report.html", (past + 1, past + 1))
    assert run.over and frame(run)[-1].startswith("The run has stopped (continue with --resume)")


def test_a_run_that_has_not_begun_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watch(tmp_path)
    assert "Waiting for a run to start there" in capsys.readouterr().out
    begin(tmp_path, [])
    watch(tmp_path, once=True)
    assert "Waiting for its first training line" in capsys.readouterr().out


def test_live_until_the_run_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, to rich
    monkeypatch.setenv("TERM", "xterm")
    records = monitored_run.whole_run()
    begin(tmp_path, [])
    turns = [records[:1], records[1:3], records[3:]]
    monkeypatch.setattr(watching.time, "sleep", lambda seconds: add(tmp_path, turns.pop(0)))
    watch(tmp_path, interval=0.5)
    assert not turns
    text = capsys.readouterr().out
    assert (
        text.index("Waiting for")
        < text.index("step 1/6")
        < text.index("step 2/6")
        < text.index("The run has ended")
    )


def test_a_directory_that_is_not_there_yet_is_waited_for_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    place, turns = tmp_path / "later", [None, monitored_run.whole_run()]

    def wait(seconds: float) -> None:
        if (records := turns.pop(0)) is not None:
            begin(place, records)

    monkeypatch.setattr(watching.time, "sleep", wait)
    watch(place)
    text = capsys.readouterr().out
    assert text.index("Waiting for a run to start there") < text.index("The run has ended")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file: give the --run-dir"):
        watch(tmp_path / "file")


def test_ctrl_c_leaves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(watching.time, "sleep", interrupt)
    watch(begin(tmp_path, [monitored_run.training(1)]))
    assert "Stopped watching; the run continues." in capsys.readouterr().out


def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["watch", str(tmp_path / "absent")])
    assert caught.value.code == 2 and "absent does not exist" in capsys.readouterr().err
    begin(tmp_path, [])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(
        UserError,
        match=r"metrics\.jsonl has a line that is not a metrics record, ending at byte 11",
    ):
        watch(tmp_path)


def test_command_passes_its_arguments_and_help_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    seen = []
    monkeypatch.setattr(
        watching, "watch", lambda run_dir, **options: seen.append((run_dir, options))
    )
    for arguments in (["watch", str(tmp_path), "--once", "--interval", "5"], ["watch", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main.main(arguments)
        assert caught.value.code == 0
    assert seen == [(tmp_path, {"once": True, "interval": 5.0})]
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert max(map(len, lines)) <= 80 and lines[-1].strip() == "moe-jax watch runs/first"


def test_bars_and_durations() -> None:
    assert (
        sparkline([1.0, 2.0, 3.0], 10) == "▁▅█"
        and sparkline([2.0, 2.0], 10) == "▁▁"
        and sparkline([], 10) == ""
    )
    assert sparkline([0.0] * 50 + [7.0] * 50, 2) == "▁█"
    assert load_bars([8, 4, 1, 0], 4) == "█▄▁x" and load_bars([8, 0], 6) == "███xxx"
    assert load_bars([8, 0, 4, 4], 2) == "█▄" and load_bars([0, 0], 2) == "xx"
    assert [duration(seconds) for seconds in (59.4, 61, 3661, 90_000)] == [
        "59 s",
        "1 min 1 s",
        "1 h 1 min",
        "25 h 0 min",
    ]
    assert len(watch_frame.RAMP) == len(watch_frame.ASCII_RAMP)
