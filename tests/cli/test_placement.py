"""`moe-jax placement`: plan, show and diff on load files, tables and a run that was never
trained.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

from moe_jax.checkpoint.manager import Checkpoints
from moe_jax.cli import main
from moe_jax.errors import UserError
from moe_jax.placement.files import read_table, read_topology
from moe_jax.placement.table import contiguous, round_robin
from moe_jax.tracking.traffic import read_measured
from tests.support import ROOT

TOPOLOGY = str(ROOT / "configs" / "placement" / "topology.yaml")
CONFIG = """
mesh: {data: 2, expert: 4}
model: {num_layers: 3, width: 64}
moe: {num_experts: 8, first_dense: 1}
placement: {redundant_slots: 1}
train: {global_batch: 16}
"""


def call(*arguments: object) -> int:
    """Exit code of `moe-jax placement ARGUMENTS`."""
    with pytest.raises(SystemExit) as caught:
        main.main(["placement", *map(str, arguments)])
    return caught.value.code


def traffic(layers: int, ranks: int, experts: int) -> dict:
    """A load file's content, with busy experts."""
    draw = np.random.default_rng(0)
    counts = (
        1000
        * draw.lognormal(0, 0.8, (layers, 1, experts))
        * draw.lognormal(0, 0.5, (layers, ranks, experts))
    )
    head = {
        "version": 1,
        "step": 40,
        "steps": 10,
        "num_experts": experts,
        "layers": list(range(1, layers + 1)),
    }
    return head | {"traffic": counts.astype(int).tolist()}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "load.json").write_text(json.dumps(traffic(2, 8, 16)))
    return tmp_path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with checkpoints of two tables."""
    path = tmp_path_factory.mktemp("runs") / "first"
    path.mkdir()
    (path / "config.yaml").write_text(CONFIG)
    (path / "traffic.json").write_text(json.dumps(traffic(2, 4, 8)))
    checkpoints = Checkpoints(path / "checkpoints", 2, 0)
    for step, table in ((20, contiguous(2, 8, 4, 1)), (40, round_robin(2, 8, 4, 1))):
        checkpoints.save(
            step, {"x": jnp.zeros(3)}, {"placement": table.to_json(), "config": CONFIG}, wait=True
        )
    checkpoints.close()
    return path


@pytest.mark.parametrize("command", ["plan", "show", "diff"])
def test_help_fits_80_columns_and_ends_with_an_example(command, capsys):
    assert call(command, "--help") == 0
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert max(map(len, lines)) <= 80 and lines[-2].strip() == "Example:"
    assert lines[-1].split()[:3] == ["moe-jax", "placement", command]


def test_plan_prints_draws_and_writes_a_table_that_training_reads(here, capsys):
    assert (
        call(
            "plan",
            "load.json",
            "--topology",
            TOPOLOGY,
            "--redundant-slots",
            1,
            "--strategy",
            "topology_aware",
            "--out",
            "p.json",
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert max(map(len, out.splitlines())) <= 80
    assert "topology_aware for 8 devices on 2 hosts, from 10 steps of load" in out
    assert re.search(r"(?m)^rows on the busiest link, sum of layers +[\d,]+ +[\d,]+ +[+-]", out)
    weight = read_topology(Path(TOPOLOGY)).between_weight
    assert weight > 1 and f"On links, a row between hosts counts {weight:.3g} times" in out
    assert (
        "from \\ to" in out
        and "experts must move" in out
        and "wrote load-placement.png and p.json" in err
    )
    table = read_table(Path("p.json"), layers=2, num_experts=16, ranks=8, max_experts_per_device=3)
    assert table.num_slots == 24 and table.empty_slots == 0
    assert imread("load-placement.png").shape[1] == 1080
    capsys.readouterr()
    assert call("show", "p.json", "--layer", 1) == 0
    assert call("diff", "p.json", "p.json") == 0
    assert "Every device holds the same experts." in capsys.readouterr().out


def test_plan_in_json_has_the_figures_of_both(here, capsys):
    assert call("plan", "load.json", "--json", "--png", "a.png") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["between_weight"] == 1
    rows = np.sum(traffic(2, 8, 16)["traffic"]) / 10
    for name in ("today", "proposed"):
        assert (
            np.sum(found[name]["device_load"])
            == pytest.approx(rows)
            == pytest.approx(np.sum(found[name]["traffic"]))
        )
    even = found["figures"]["max_over_mean"]
    assert even["proposed"] < 0.9 * even["today"] and found["moves"] > 0
    assert found["predicted_gain"]["busiest_device_rows"] > 0.1
    assert [layer["layer"] for layer in found["proposed"]["layers"]] == [1, 2]


def test_load_without_sources_needs_ranks(here, capsys):
    content = traffic(2, 8, 16)
    content["load"] = np.sum(content.pop("traffic"), axis=1).tolist()
    Path("load.json").write_text(json.dumps(content))
    assert call("plan", "load.json") == 2
    assert "give --ranks" in capsys.readouterr().err
    assert call("plan", "load.json", "--ranks", 4, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert "each is assumed to send an equal part" in " ".join(found["notes"])
    assert len(found["host_of_device"]) == 4


def test_existing_files_stay(here, capsys):
    Path("mine.json").write_text("mine")
    assert call("plan", "load.json", "--out", "mine.json") == 2
    assert (
        "--out mine.json exists already" in capsys.readouterr().err
        and Path("mine.json").read_text() == "mine"
    )
    assert not Path("load-placement.png").exists()
    assert call("plan", "load.json", "--out", "mine.json", "--overwrite") == 0
    assert read_table(Path("mine.json")).ranks == 8
    assert call("plan", "load.json", "--png", "load-placement.png") == 2
    assert "--png load-placement.png exists already" in capsys.readouterr().err


def test_a_plan_can_be_looked_at_again(here, capsys):
    """The picture that nobody named is drawn again, as a report is."""
    Path("load-placement.png").write_text("drawn before")
    assert call("plan", "load.json", "--strategy", "contiguous") == 0
    assert Path("load-placement.png").read_bytes().startswith(b"\x89PNG")
    out = " ".join(capsys.readouterr().out.split())
    assert "0 experts must move." in out and "busiest device 0.0%, on the busiest link 0.0%" in out
    assert "-0.0%" not in out and "+0.0%" not in out


def test_plan_show_and_diff_of_a_run(run, here, capsys):
    assert call("plan", run, "--topology", TOPOLOGY, "--json", "--out", "p.json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["slots_per_device"] == {"today": 3, "proposed": 3} and found["notes"] == []
    assert found["host_of_device"] == [0, 0, 0, 0]  # each data row has a host
    assert (run.parent / "first-placement.png").is_file()
    assert call("show", run) == call("show", run, "--step", 20, "--layer", 2) == 0
    newest, older = capsys.readouterr().out.split("8 experts in")[1:]
    assert "layers 1-2" in newest and "0-1, 4" in newest and "layer 2" in older and "0-2" in older
    assert call("diff", run, "p.json") == 0
    assert "experts move, in 2 of 2 layers." in capsys.readouterr().out


def test_diff_tells_what_moves_where(here, capsys):
    for name, table in (
        ("a.json", contiguous(1, 4, 2)),
        ("b.json", round_robin(1, 4, 2)),
        ("c.json", contiguous(1, 4, 4)),
    ):
        Path(name).write_text(json.dumps(table.to_json()))
    assert call("diff", "a.json", "b.json") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["0", "0", "2", "from", "1", "1"] in lines and ["0", "1", "1", "from", "0", "2"] in lines
    assert lines[-1] == ["2", "experts", "move,", "in", "1", "of", "1", "layers."]
    assert call("diff", "a.json", "c.json") == 2
    assert "a.json has 2 devices and c.json has 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "nowhere.json"], "nowhere.json: there is no such file"),
        (["plan", "load.json", "--strategy", "evenly"], "--strategy 'evenly' is unknown"),
        (
            ["plan", "load.json", "--ranks", "6", "--topology", TOPOLOGY],
            "6 ranks x tensor=1 do not divide",
        ),
        (["plan", "."], "has no traffic.json"),
        (["show", "load.json"], "load.json leaves out num_slots, physical_to_logical"),
        (["show", "load.json", "--step", "3"], "choose a run's checkpoint"),
        (["show", "."], "is not a run directory"),
        (["plan", "load.json", "--out", "nowhere/p.json"], "nowhere/p.json: No such file"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_2(arguments, words, here, capsys):
    assert call(*arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("moe-jax: ") and err.count("\n") == 1 and words in err


def test_mistakes_about_a_run(run, capsys):
    for arguments, words in (
        (["show", run, "--step", 30], "no checkpoint of step 30: there are 20, 40"),
        (["show", run, "--layer", 0], "--layer 0 has no experts"),
    ):
        assert call(*arguments) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.update(version=2), "has version 2"),
        (lambda f: f.pop("steps"), "leaves out steps"),
        (lambda f: f.pop("traffic"), "must have either traffic or load"),
        (lambda f: f.update(steps=0), "steps=0 must be"),
        (lambda f: f.update(layers="all"), "layers must be a list"),
        (lambda f: f["layers"].append(7), "traffic has 2 layers and `layers` names 3"),
        (
            lambda f: f["traffic"][1][3].pop(),
            r"traffic of layer 2 is not \[source ranks\]\[16\] numbers",
        ),
        (
            lambda f: f["traffic"][1].pop(),
            r"traffic of layer 2 has shape \[7, 16\]: it must be \[8, 16\]",
        ),
        (
            lambda f: f.update(num_experts=9),
            r"traffic of layer 1 has shape \[8, 16\]: it must be \[source ranks\]\[9\]",
        ),
        (
            lambda f: f["traffic"][1][3].__setitem__(5, -1),
            "traffic of layer 2 holds -1 for expert 5",
        ),
        (
            lambda f: f["traffic"][0][3].__setitem__(5, float("nan")),
            "traffic of layer 1 holds nan for expert 5",
        ),
        (lambda f: f["traffic"][0][3].__setitem__(5, "many"), "traffic of layer 1 is not"),
    ],
)
def test_a_wrong_load_file_is_refused_with_its_layer(change, words, here):
    content = traffic(2, 8, 16)
    change(content)
    Path("load.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        read_measured(Path("load.json"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t["physical_to_logical"][1].__setitem__(1, 7),
            "layer 1 leaves expert 1 without a slot",
        ),
        (
            lambda t: t["physical_to_logical"][1].__setitem__(2, 1),
            "layer 1 has expert 1 twice on device 0",
        ),
        (lambda t: t["physical_to_logical"][1].__setitem__(0, 8), "layer 1 names expert 8"),
        (
            lambda t: t["physical_to_logical"][1].pop(),
            "is not a list for each layer of num_slots=12 whole numbers",
        ),
        (lambda t: t.update(version=9), "version 9"),
        (lambda t: t.pop("num_slots"), "leaves out num_slots"),
    ],
)
def test_a_wrong_table_is_refused_with_layer_and_expert(change, words, here):
    content = contiguous(2, 8, 4, 1).to_json()
    change(content)
    Path("table.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"table\.json.*{words}"):
        read_table(Path("table.json"))


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"layers": 3}, "for 2 layers, but 3 are needed"),
        ({"num_experts": 9}, "for 8 experts, but 9 are needed"),
        ({"ranks": 8}, "for 4 devices, but 8 are needed"),
        (
            {"max_experts_per_device": 2},
            "layer 0 puts 3 experts on device 0, and placement.max_experts_per_device=2: move "
            "expert 2 ",
        ),
    ],
)
def test_a_table_for_something_else_is_refused(wanted, words, here):
    Path("table.json").write_text(json.dumps(contiguous(2, 8, 4, 1).to_json()))
    with pytest.raises(UserError, match=words):
        read_table(Path("table.json"), **wanted)
