"""A model over several real processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.command import run_module
from tests.support.hf_folder import make_folder


@pytest.mark.slow
def test_two_and_four_processes_say_what_one_says_and_read_their_shares(tmp_path: Path) -> None:
    """Quicker tests: a chat over two processes (tests/cli/test_processes.py), and the bytes of each
    device (tests/inference/test_load.py).
    """
    model = make_folder("qwen3_moe-plain", tmp_path / "model")
    say = ["generate", str(model), "--prompt", "hello there", "--max-tokens", "24", "--greedy"]
    cases = {
        str(count): {
            "commands": {number: [*say, "--mesh", "expert=4"] for number in range(count)},
            "processes": count,
        }
        for count in (1, 2, 4)
    }
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    done = run_module("joined", tmp_path / "cases.json")
    assert done.returncode == 0, done.stderr
    ended = json.loads(done.stdout)
    alone = ended["1"]["out"]["0"]
    assert alone.strip()
    total = json.loads(ended["1"]["read"]["0"])["read"]
    for count in (1, 2, 4):
        case = ended[str(count)]
        assert set(case["codes"].values()) == {0}, case
        assert list(case["out"].values()) == [alone, *(count - 1) * [""]]
        counts = [json.loads(text) for text in case["read"].values()]
        assert len(counts) == count
        for one in counts:
            assert 0 < one["read"] <= 1.02 * one["share"]
            assert count == 1 or one["read"] < 0.75 * total
