"""Several processes that cannot work together: one sentence that names what is wrong, exit code 2
on all of them, within a bounded time. Real processes, which join as those of a cluster do.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from moe_jax.config.schema import DataConfig
from moe_jax.data.prepare import prepare
from tests.support.command import run_module
from tests.support.hf_folder import make_folder
from tests.support.tiny_run import config_file, corpus

SETTINGS = ["devices.simulate=2", "mesh.data=1", "mesh.expert=2", "model.num_layers=1"]
HERE = r"127\.0\.0\.1:\d+"
# What each process says.
REFUSED = {
    "other configuration": "process 1 .* another configuration than process 0: 'seed: 1'",
    "other run directory": "process 1 .* has another run directory than process 0",
    "other version": "process 1 .* another version of moe-jax than process 0: '0.0.1'",
    "other model": "process 1 .* has another model than process 0",
    "unseen directory": r"--run-dir .* on .* \(process 1\) is not the directory that process 0",
    "too few rows": r"train\.global_batch=1 is not divisible by the 2 processes",
    "other tokenizer": r"data\.source=.* was prepared with another tokenizer \(bytes\)",
    "busy port": rf"--coordinator {HERE}: process 0 cannot listen on port \d+",
    "alone": rf"process 0 did not meet the others at {HERE} \(waited 1 s\)",
    "no coordinator": f"--coordinator {HERE} cannot be reached from process 1",
    "deaf coordinator": rf"process 1 did not meet the others at {HERE} \(waited 1 s\)",
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """How the processes of each case ended."""
    root = tmp_path_factory.mktemp("joining")
    prepare(DataConfig(source=str(corpus(root))), root / "prepared")
    one = make_folder("qwen3_moe-plain", root / "a" / "model")
    two = shutil.copytree(one, root / "b" / "model")
    config = json.loads((two / "config.json").read_text())
    (two / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0}))

    def train(*settings: str, run: str = "run") -> list[str]:
        sets = [word for text in (*SETTINGS, *settings) for word in ("--set", text)]
        return ["train", str(config_file(root)), *sets, "--run-dir", str(root / run)]

    def say(model: Path) -> list[str]:
        return ["generate", str(model), "--prompt", "a", "--mesh", "expert=2"]

    def case(*commands: list[str] | None, amiss: str | None = None) -> dict[str, Any]:
        words = {n: command for n, command in enumerate(commands) if command is not None}
        return {"commands": words, "processes": len(commands), "amiss": amiss}

    hasty = [*train(), "--join-timeout", "1"]
    tokenizer = f"data.tokenizer={one / 'tokenizer.json'}"
    other = train(f"data.source={root / 'prepared'}", tokenizer, run="tokenizer")
    one_row = ["train.global_batch=1", "mesh.tensor=2", "mesh.expert=1", "model.num_kv_heads=2"]
    narrow = train(*one_row, run="narrow")
    cases = {
        "other configuration": case(train(), train("train.seed=1")),
        "other run directory": case(train(), train(run="other")),
        "other version": case(train(), train(), amiss="version"),
        "other model": case(say(one), say(two)),
        "unseen directory": case(*2 * [train(run="unseen")], amiss="unseen directory"),
        "too few rows": case(narrow, narrow),
        "other tokenizer": case(other, other),
        "busy port": case(hasty, None, amiss="busy port"),
        "alone": case(hasty, None),
        "no coordinator": case(None, hasty),
        "deaf coordinator": case(None, hasty, amiss="busy port"),
    }
    (root / "cases.json").write_text(json.dumps(cases))
    done = run_module("joined", root / "cases.json")
    assert done.returncode == 0, done.stderr
    assert not list(root.glob("*/config.yaml"))
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_one_sentence_and_ends_all(ended: dict[str, Any], name: str) -> None:
    case = ended[name]
    assert set(case["codes"].values()) == {2}, case
    for text in case["err"].values():
        sentences = [line for line in text.splitlines() if line.startswith("moe-jax: ")]
        assert len(sentences) == 1 and re.search(REFUSED[name], sentences[0]), text
        assert sentences[0].count("process 1") <= 1, text
        assert "Traceback" not in text and "*** " not in text
    assert case["seconds"] < 60
