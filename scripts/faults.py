"""Plants faults in real runs of several processes and sees what happens: python scripts/faults.py

    python scripts/faults.py --list                     the faults and their names
    python scripts/faults.py --only kill-save --only stop    those whose names begin so
    python scripts/faults.py --only random --moments 5 --seed 7
    python scripts/faults.py --write                    also renews the table of docs/reliability.md

Each fault is planted in runs of a tiny model over two processes of two devices, on this machine,
which are compared with an undisturbed run: loss and gradient norm of every step to the last bit,
the exit code, the terminal (no stack dump), the steps computed again, and that no process is left
over. All of them take about an hour on two cores, so --write replaces only the rows that ran.

Exit codes: 0 all holds; 1 something does not, which the last lines name; 2 a mistake.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fault_checkpoints
import fault_runs
from fault_runs import EVERY, ROOT, SOON, STEPS, Bench, Launch, Missed, Moment, Outcome

PAGE = ROOT / "docs" / "reliability.md"
HANG = 10  # seconds of train.hang_timeout where a process is stopped
TRIES = 4  # runs in which the moment may be missed
HEAD = (
    "| fault | what happens | times | noticed after, s | trains again after, s | steps computed "
    "again |\n|---|---|---|---|---|---|"
)


class Row(NamedTuple):
    """A line of the table."""

    name: str
    fault: str
    happens: str
    runs: int  # starts that it takes, per random moment; for the estimate of time
    work: Callable[[Bench], Outcome]


# Deaths


def killed(process: int, phase: str) -> Callable[[Bench], Outcome]:
    """SIGKILL in a phase."""

    def work(bench: Bench) -> Outcome:
        outcome = Outcome(times=1)
        for attempt in range(TRIES):
            run_dir = bench.half_run() if phase == "restore" else bench.new_run()
            more = ["--resume"] if phase == "restore" else []
            with bench.launch(run_dir, *more, restarts=3, cache=phase != "compile") as launch:
                try:
                    told = fault_runs.kill(launch, run_dir, moment_of(run_dir, process, phase))
                except Missed as missed:
                    if attempt == TRIES - 1:
                        outcome.wrong.append(str(missed))
                    continue
                launch.finish()
                outcome.add(told)
                outcome.wrong += fault_runs.faults_of(launch, run_dir, bench.curve)
                return outcome
        return outcome

    return work


def moment_of(run_dir: Path, process: int, phase: str) -> Moment:
    """When a process is in a phase; in `step` after the first checkpoint."""
    if phase == "save":
        return fault_runs.in_save(run_dir, process)
    if phase == "step":
        return fault_runs.in_phase(run_dir, process, "step", "data", step=EVERY + 1)
    return fault_runs.in_phase(run_dir, process, phase)


def at_random(process: int) -> Callable[[Bench], Outcome]:
    """SIGKILL at moments spread evenly over a run."""

    def work(bench: Bench) -> Outcome:
        outcome, rng = Outcome(), random.Random(f"{bench.seed} {process}")
        assert bench.undisturbed
        for number in range(bench.moments):
            share = rng.random()
            for attempt in range(TRIES):
                # A run that was quicker than the undisturbed one has ended: a little sooner then.
                seconds = share * bench.seconds * 0.9**attempt
                try:
                    found = _killed_at(bench, process, seconds)
                except Missed as missed:
                    found = Outcome(wrong=[str(missed)])
                    continue
                break
            where = f"moment {number} at {seconds:.1f} s, {' '.join(found.notes)}"
            found.wrong = [f"{where}: {text}" for text in found.wrong]
            outcome.join(found)
            _say(f"    moment {number + 1}/{bench.moments}: {found.wrong or where}")
        return outcome

    return work


def _killed_at(bench: Bench, process: int, seconds: float) -> Outcome:
    """SIGKILL so many seconds after the start."""
    outcome, run_dir = Outcome(times=1), bench.new_run()
    with bench.launch(run_dir, restarts=3) as launch:
        moment = fault_runs.at_time(launch, process, seconds)
        outcome.add(fault_runs.kill(launch, run_dir, moment))
        launch.finish()
        outcome.wrong += fault_runs.faults_of(launch, run_dir, bench.curve)
    return outcome


def stopped(process: int) -> Callable[[Bench], Outcome]:
    """SIGSTOP: a process that is there and does nothing."""

    def work(bench: Bench) -> Outcome:
        outcome, run_dir = Outcome(times=1), bench.new_run()
        with bench.launch(run_dir, restarts=3, train__hang_timeout=HANG) as launch:
            moment = moment_of(run_dir, process, "step")
            told = fault_runs.kill(launch, run_dir, moment, signal.SIGSTOP)
            launch.finish()
            outcome.add(told, within=HANG + 10)
            outcome.wrong += fault_runs.faults_of(launch, run_dir, bench.curve)
        return outcome

    return work


def terminated(process: int) -> Callable[[Bench], Outcome]:
    """SIGTERM to one process: all save at one step, and nothing is lost."""

    def work(bench: Bench) -> Outcome:
        outcome, run_dir = Outcome(times=1), bench.new_run()
        with bench.launch(run_dir) as launch:
            pid = launch.until("a step", moment_of(run_dir, process, "step"))
            os.kill(pid, signal.SIGTERM)
            hit = time.monotonic()
            code = launch.finish()
            outcome.noticed.append(time.monotonic() - hit)
            reached, checkpoints = fault_runs.newest_step(run_dir), fault_runs.saved(run_dir)
            if code or launch.left_over():
                outcome.wrong.append(f"exit code {code}: {launch.text[-200:]!r}")
            if checkpoints[-1:] != [reached] or reached == STEPS:
                outcome.wrong.append(f"at step {reached}, but saved are {checkpoints}")
        outcome.again.append(reached - max(checkpoints, default=0))
        with bench.launch(run_dir, "--resume") as launch:
            launch.finish()
            outcome.wrong += fault_runs.faults_of(launch, run_dir, bench.curve)
        return outcome

    return work


def launch_killed(bench: Bench) -> Outcome:
    """SIGKILL of `launch`: its processes go too, and the run can be resumed."""
    outcome, run_dir = Outcome(times=1), bench.new_run()
    with bench.launch(run_dir) as launch:
        launch.until("a step", moment_of(run_dir, 1, "step"))
        launch.process.kill()
        hit = time.monotonic()
        while launch.left_over() and time.monotonic() < hit + SOON:
            time.sleep(0.01)
        outcome.noticed.append(time.monotonic() - hit)
        if left := launch.left_over():
            outcome.wrong.append(f"processes left over: {left}")
        reached, checkpoints = fault_runs.newest_step(run_dir), fault_runs.saved(run_dir)
    outcome.again.append(reached - max(checkpoints, default=0))
    with bench.launch(run_dir, "--resume", "--fallback") as launch:
        launch.finish()
        outcome.wrong += fault_runs.faults_of(launch, run_dir, bench.curve)
    return outcome


def talking(process: int) -> Callable[[Bench], Outcome]:
    """SIGKILL while text is generated by two processes: the command ends and names the process."""

    def work(bench: Bench) -> Outcome:
        outcome, model = Outcome(times=1), bench.undisturbed
        command = ["generate", model, "--prompt", "def ", "--max-tokens", 100_000, "--mesh"]
        with Launch([*command, "expert=2"], model, environment=bench.environment) as launch:
            launch.until("some text", lambda: launch.said(r"^(?!loading).*\w"))
            os.kill(launch.workers()[process], signal.SIGKILL)
            hit = time.monotonic()
            code = launch.finish(60)
            outcome.noticed.append(time.monotonic() - hit)
            named = f"process {process} of 2 was killed by SIGKILL"
            if named not in launch.text:
                outcome.wrong.append(f"not named: {launch.text[-200:]!r}")
            if outcome.noticed[0] > SOON:
                outcome.wrong.append(f"ended after {outcome.noticed[0]:.1f} s")
            outcome.wrong += fault_runs.faults_of(launch, model, [], 128 + signal.SIGKILL)
            outcome.notes.append(f"exit code {code}")
        return outcome

    return work


# The table

GOES_ON = "`launch` names it and its phase, ends all, restarts from the last checkpoint"
PHASES = ("start", "compile", "step", "evaluation", "save", "restore")
NAMES = ("process 0, which hosts the coordinator,", "process 1")
STOPS = "the other ends itself (exit code 75) after `train.hang_timeout`; `launch` restarts all"
SAVES = "all save at the same step and exit with 0; `--resume` goes on from there"
ENDS = "the command ends with one sentence that names the process"


ROWS = (
    *(
        Row(f"kill-{phase}-{n}", f"SIGKILL of {NAMES[n]} in {phase}", GOES_ON, 2, killed(n, phase))
        for phase in PHASES
        for n in (1, 0)
    ),
    *(
        Row(f"random-{n}", f"SIGKILL of {NAMES[n]} at random moments", GOES_ON, 2, at_random(n))
        for n in (1, 0)
    ),
    *(Row(f"stop-{n}", f"SIGSTOP of {NAMES[n]} in step", STOPS, 3, stopped(n)) for n in (1, 0)),
    *(Row(f"term-{n}", f"SIGTERM to {NAMES[n]} alone", SAVES, 2, terminated(n)) for n in (1, 0)),
    Row("launch", "SIGKILL of `launch`", "all processes end", 2, launch_killed),
    *(
        Row(name, fault, happens, runs, work)
        for name, fault, happens, runs, work in fault_checkpoints.ROWS
    ),
    *(
        Row(f"generate-{n}", f"SIGKILL of {NAMES[n]} in `generate`", ENDS, 1, talking(n))
        for n in (1, 0)
    ),
)


def line_of(row: Row, outcome: Outcome) -> str:
    """A row of the table; times are the longest ones, with the shortest where there are several."""
    if outcome.skipped:
        return f"| {row.fault} | skipped: {outcome.skipped} | | | | |"
    happens = row.happens if not outcome.wrong else f"**{len(outcome.wrong)} of it does not hold**"
    cells = [
        row.fault,
        happens,
        str(outcome.times),
        _span(outcome.noticed, "{:.1f}"),
        _span(outcome.back, "{:.0f}"),
        _span(outcome.again, "{}"),
    ]
    return f"| {' | '.join(cells)} |"


def _span(values: list[Any], form: str) -> str:
    shown = list(dict.fromkeys(form.format(value) for value in sorted(values)))
    return " to ".join([*shown[:1], *shown[-1:]][: min(len(shown), 2)])


def write_page(lines: dict[str, str]) -> None:
    """Puts rows into the table of docs/reliability.md in the place of those of the same fault."""
    text = PAGE.read_text()
    head, _, rest = text.partition("<!-- faults -->\n")
    old, _, tail = rest.partition("<!-- end -->")
    kept = {line.split(" | ")[0].removeprefix("| "): line for line in old.splitlines()}
    rows = [lines.get(row.fault) or kept.get(row.fault) for row in ROWS]
    today = datetime.date.today().isoformat()
    made = f"Last rows: {today}, {os.cpu_count()} cores, Python {platform.python_version()}."
    table = "\n".join([HEAD, *filter(None, rows)])
    PAGE.write_text(f"{head}<!-- faults -->\n{made}\n\n{table}\n<!-- end -->{tail}")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", action="append", metavar="NAME", help="faults whose names begin so; may repeat")
    add("--moments", type=int, default=10, metavar="N", help="random ones of each [default: 10]")
    add("--seed", type=int, default=0, metavar="N", help="of the random moments and places")
    add("--folder", type=Path, metavar="DIR", help="keep the runs here  [default: nowhere]")
    add("--json", action="store_true", help="print JSON in the place of the table")
    add("--write", action="store_true", help="renew these rows in docs/reliability.md")
    add("--list", action="store_true", help="print the names of the faults and end")
    given = parser.parse_args(argv)
    given.rows = [
        row for row in ROWS if not given.only or any(row.name.startswith(n) for n in given.only)
    ]
    if not given.rows or given.moments < 1:
        parser.error(f"--only {given.only}, --moments {given.moments}: choose names of --list")
    return given


def run_rows(rows: list[Row], bench: Bench) -> dict[str, Outcome]:
    """Plants the faults, saying how far it is."""
    outcomes: dict[str, Outcome] = {}
    starts = {
        row.name: row.runs * (bench.moments if row.name.startswith("random") else 1) for row in rows
    }
    began, done, total = time.monotonic(), 0, sum(starts.values())
    for number, row in enumerate(rows, 1):
        elapsed = time.monotonic() - began
        left = f", about {elapsed / done * (total - done) / 60:.0f} min left" if done else ""
        _say(f"[{number}/{len(rows)}] {row.name}: {re.sub('`', '', row.fault)}{left}")
        start = time.monotonic()
        try:
            outcome = row.work(bench)
        except Missed as missed:
            outcome = Outcome(wrong=[str(missed)])
        outcomes[row.name] = outcome
        notes = ", ".join(f"{outcome.notes.count(n)} {n}" for n in dict.fromkeys(outcome.notes))
        verdict = outcome.skipped or "; ".join(outcome.wrong) or "holds"
        _say(f"    {verdict} ({time.monotonic() - start:.0f} s; {notes})")
        done += starts[row.name]
    return outcomes


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Exit code of the script."""
    given = arguments(argv)
    if given.list:
        print("\n".join(f"{row.name:18} {row.fault}" for row in given.rows))
        return 0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # leave no run
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        folder = Path(scratch) if given.folder is None else given.folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        outcomes = run_rows(given.rows, Bench(folder, given.seed, given.moments))
    lines = {row.fault: line_of(row, outcomes[row.name]) for row in given.rows}
    if given.json:
        print(json.dumps({name: dataclasses.asdict(one) for name, one in outcomes.items()}))
    else:
        print("\n".join([HEAD, *lines.values()]))
    if given.write:
        write_page(lines)
    bad = {name: one.wrong for name, one in outcomes.items() if one.wrong}
    for name, wrong in bad.items():
        _say(f"{name}: {'; '.join(wrong)}")
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
