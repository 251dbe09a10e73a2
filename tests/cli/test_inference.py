"""The commands that run a model, as typed: what comes on stdout and stderr, exit codes, and what
the engine is asked for.
"""

from __future__ import annotations

import io
import json
import math
import re
import signal
import sys

import pytest

from moe_jax.cli.options import ReplyFlags
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.runtime import terminal
from tests.support import fake_model
from tests.support.command import call, run_module
from tests.support.slow import slow_unless


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "config.yaml").write_text("name: x\n")
    return tmp_path


@pytest.fixture
def model(monkeypatch):
    """A model that shouts the last line back, and what it was opened with."""
    loaded = fake_model.Loaded(fake_model.shout)
    loaded.opened = fake_model.install(monkeypatch, loaded)
    return loaded


def test_generate_streams_only_the_text(monkeypatch, capsys, run_dir, model):
    assert (
        call(
            "generate", run_dir, "--prompt", "U:def\nA:", "--greedy", "--top-k", "3", "--step", "20"
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert out == "DEF\n"
    assert (
        "prompt 8 tokens, " in err
        and "generated 3 tokens, " in err
        and "compiled in" in err
        and "peak memory" in err
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("U:from stdin\nA:"))
    assert (
        call(
            "generate",
            run_dir,
            "--prompt",
            "-",
            "--max-tokens",
            "6",
            "--stop",
            "zzz",
            "--temperature",
            "0",
        )
        == 0
    )
    assert capsys.readouterr().out == "FROM S\n"
    assert [opened["step"] for opened in model.opened] == [20, None] and model.opened[0][
        "path"
    ] == run_dir
    sampled = ["generate", run_dir, "--prompt", "U:ab\nA:", "--seed", "3", "--temperature", "2"]
    assert call(*sampled, "--max-tokens", "50") == 0
    first = capsys.readouterr().out
    assert call(*sampled, "--max-tokens", "50") == 0
    assert capsys.readouterr().out == first


def test_generate_from_a_folder(capsys, tmp_path, model):
    arguments = ["generate", tmp_path, "--greedy"]
    assert (
        call(
            *arguments,
            "--prompt",
            "hello",
            "--system-prompt",
            "loud",
            "--mesh",
            "expert=4",
            "--dtype",
            "bfloat16",
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert out == "HELLO\n"
    assert err.startswith("--system-prompt: the prompt is put into the model's chat template")
    assert model.feeds[0] == list(b"S:loud\nU:hello\nA:")
    assert model.opened[0]["mesh"].expert == 4 and model.opened[0]["dtype"] == "bfloat16"
    model.context = 10
    assert call(*arguments, "--prompt", "U:too long\nA:") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(
        "moe-jax: The prompt has 13 tokens and the model's context 10: shorten it, or raise "
        "--context.\n"
    )
    assert call(*arguments, "--prompt", "U:hello\nA:") == 0
    out, err = capsys.readouterr()
    assert out == "H\n" and "the context of 10 tokens is full" in err


@pytest.mark.parametrize("old", [False, True], ids=["MODEL", "--model"])
def test_the_model_by_position_or_by_its_old_option(old, monkeypatch, tmp_path, model):
    """Every command that runs a model takes it in the same two ways."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\n"))
    model.engine = fake_model.fake_engine(lambda tokens, targets, mask: (mask.sum(), mask.sum()))
    model.speak = lambda tokens: 65
    (tmp_path / "text").write_text("some text")
    place = ["--model", tmp_path] if old else [tmp_path]
    for command in (
        ["generate", "--prompt", "x", "--max-tokens", "1"],
        ["chat"],
        ["eval", "--text", tmp_path / "text"],
        ["bench", "-p", "4", "-g", "2", "--repeats", "1"],
    ):
        assert call(command[0], *place, *command[1:]) == 0
        assert model.opened.pop()["path"] == tmp_path and model.opened == []


def test_chat_through_a_pipe(monkeypatch, capsys, tmp_path, model):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n/quit\n"))
    assert call("chat", tmp_path, "--greedy", "--system-prompt", "loud") == 0
    out, err = capsys.readouterr()
    assert out == "ONE\n" and "fake in float32, loaded in" in err and "context 200 tokens" in err
    model.tokenizer = load_tokenizer("bytes")
    assert call("chat", tmp_path) == 2
    assert "no chat template" in capsys.readouterr().err


def test_eval_and_bench(capsys, tmp_path, model):
    """Figures as JSON and as lines; both quantised and not where a text is there to compare on."""
    scores = iter([2.0, 1.0, 1.0, 1.0])
    model.engine = fake_model.fake_engine(
        lambda tokens, targets, mask: (next(scores) * mask.sum(), mask.sum())
    )
    (tmp_path / "text").write_text("some text")
    text = ("--text", tmp_path / "text")
    model.speak = lambda tokens: 65
    small = ("-p", "4", "-g", "2", "--repeats", "1")
    assert call("bench", tmp_path, *small, "--quantize", "int4", "--json", *text) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["perplexity"] == pytest.approx(math.e**2) and found[
        "perplexity_unquantised"
    ] == pytest.approx(math.e)
    assert [opened["quantize"] for opened in model.opened] == ["int4", None, "int4"]
    assert (
        found["decode_tokens_per_second"] > 0
        and found["load_seconds"] > 0
        and found["read_bytes_per_second"] > 1e8
    )
    assert call("bench", tmp_path, *small) == 0
    out = capsys.readouterr().out
    assert re.search(r"(?m)^share of floor +\d+\.\d%$", out) and "_" not in out
    assert re.search(r"(?m)^decode read per step +[\d.]+ (bytes|[KM]iB)$", out)
    assert re.search(r"(?m)^read per second +[\d.]+ [KMG]iB/s$", out)
    assert re.search(r"(?m)^prefill +[\d.e-]+ s$", out)
    assert call("eval", tmp_path, "--json", *text) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["nats_per_token"] == pytest.approx(1.0)
        and found["tokens"] == 8
        and found["quantize"] is None
    )
    assert call("eval", tmp_path, *text) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["perplexity", "2.7183"]


def test_ctrl_c_ends_the_line_of_generate_and_its_rates_are_printed(capsys, tmp_path, model):
    def interrupted(tokens):
        if len(tokens) == 3:
            signal.raise_signal(signal.SIGINT)
        return 65

    model.speak = interrupted
    assert call("generate", tmp_path, "--prompt", "x", "--greedy") == 130
    out, err = capsys.readouterr()
    assert out == "AAA\n" and "generated 3 tokens, " in err and "; interrupted\n" in err
    assert "peak memory" in err


def test_a_reply_by_the_template_and_what_it_is_told(monkeypatch, capsys, tmp_path, model):
    thought = b"<think>hm</think>YES"
    model.speak = lambda tokens: [*thought, 256][len(bytes(tokens).rpartition(b"B:")[2])]
    told = ("--template-kwargs", "reply=B:", "--show-reasoning", "--thinking", "on")
    arguments = (tmp_path, "--greedy", *told)
    assert call("generate", "--prompt", "so?", "--system-prompt", "s", *arguments) == 0
    out, err = capsys.readouterr()
    assert out == "YES\n" and "\nhm\nprompt " in err
    assert bytes(model.feeds[0]) == b"S:s\nU:so?\nB:"
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffso?\n"))
    assert call("chat", *arguments) == 0
    out, err = capsys.readouterr()
    assert out == "YES\n" and "\nhm\nprompt " in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--thinking", "off"], "--thinking is for replies by the chat template: give --system"),
        (["--template-kwargs", "a=1"], "--template-kwargs is for replies"),
        (["--hide-reasoning"], "--hide-reasoning is for replies"),
        (["--thinking", "maybe"], "--thinking 'maybe' is unknown: choose on or off"),
        (["--template-kwargs", "a"], "--template-kwargs 'a' cannot be read: write it as"),
        (["--system-prompt", "s", "--template-kwargs", "b=1"], "does not use b: leave it out"),
    ],
)
def test_what_no_template_can_be_told(arguments, words, capsys, tmp_path, model):
    assert call("generate", tmp_path, "--prompt", "x", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1


def test_variables_of_a_template_are_json_where_they_can_be():
    texts = ["a=true", "b=False", "c=3", "d=high", "e=", "f=x=y", "g=[1]"]
    assert ReplyFlags(template_kwargs=texts).template().variables == {
        "a": True,
        "b": False,
        "c": 3,
        "d": "high",
        "e": "",
        "f": "x=y",
        "g": [1],
    }


def test_ctrl_c_while_a_token_is_computed_exits_130(capsys, tmp_path, model):
    def interrupted(tokens):
        raise KeyboardInterrupt

    model.speak = interrupted
    assert call("generate", tmp_path, "--prompt", "x") == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    slow_unless(["chat"].__eq__, [["generate", "--prompt", "U:x\nA:"], ["chat"]]),
    ids=lambda command: command[0],
)
def test_a_reader_of_text_that_went_away_is_no_error(command, tmp_path):
    """stdout is a pipe that nobody reads any more: no traceback, and nothing is said about it."""
    done = run_module("closed_pipe", command[0], tmp_path, *command[1:], typed="hi\n")
    assert done.returncode == 1 and "Error" not in done.stderr and "Traceback" not in done.stderr


def test_a_terminal_that_cannot_show_a_character(monkeypatch, capsys, tmp_path, model):
    model.speak = lambda tokens: "\u4e13".encode()[(len(tokens) - 1) % 3]
    terminal._say_what_is_escaped.cache_clear()
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert call("generate", tmp_path, "--prompt", "x", "--greedy", "--max-tokens", "6") == 0
    assert written.getvalue() == b"\\u4e13" * 2 + b"\n"
    assert capsys.readouterr().err.count("moe-jax: standard output is ascii; characters") == 1
