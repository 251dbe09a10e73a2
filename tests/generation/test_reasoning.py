"""What a model thinks and what it answers, split wherever the tokens are cut."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.data.tokenizer import Tokenizer, load_tokenizer
from moe_jax.generation.reasoning import Channels, Part, Thoughts, answer_pieces, reply_splitter
from tests.support import tokenizers as made


def split(splitter: Thoughts | Channels, pieces: list[str]) -> tuple[str, str]:
    """(reasoning, answer) of a reply in pieces."""
    thought: list[str] = []
    answer = "".join(answer_pieces(pieces, splitter, thought.append))
    return "".join(thought), answer


def cut(text: str, cuts: set[int]) -> list[str]:
    ends = [0, *sorted(at for at in cuts if at < len(text)), len(text)]
    return [text[a:b] for a, b in pairwise(ends)]


THOUGHTS = [
    ("<think>a < b</think>\n\nyes</think>", None, ("a < b", "yes</think>")),
    ("\n<think>\nhm\n</think>\n\n\nyes\n", None, ("\nhm\n", "yes\n")),
    ("hm</think> yes", "</think>", ("hm", "yes")),  # the prompt began it
    ("[THINK]hm[/THINK]yes", None, ("hm", "yes")),
    ("<think>hm", None, ("hm", "")),  # cut off
    ("<think>hm</thi", None, ("hm</thi", "")),
    ("yes <think>no</think>", None, ("", "yes <think>no</think>")),  # it speaks of thoughts
    (" <thin air", None, ("", " <thin air")),
    ("<", None, ("", "<")),
    ("", None, ("", "")),
    ("  ", None, ("", "  ")),
]


@pytest.mark.parametrize(("text", "begun", "wanted"), THOUGHTS)
@given(cuts=st.sets(st.integers(1, 40)))
def test_thoughts(text: str, begun: str | None, wanted: tuple[str, str], cuts: set[int]) -> None:
    assert split(Thoughts(begun), cut(text, cuts)) == wanted


ANALYSIS = "<|channel|>analysis<|message|>hm<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>yes"
CHANNELS = [
    (ANALYSIS + FINAL, ("hm", "yes")),
    ("<|channel|>final<|message|>yes<|return|>", ("", "yes")),
    (
        ANALYSIS
        + "<|start|>assistant<|channel|>commentary to=f <|constrain|>json<|message|>{}<|call|>"
        + FINAL,
        ("hm{}", "yes"),
    ),
    ("<|channel|>analysis<|message|>hm", ("hm", "")),
    (ANALYSIS + "<|start|>assistant<|channel|>fin", ("hm", "")),
    ("<|message|>yes", ("", "yes")),
    ("no header", ("", "no header")),  # of a model that was never taught any
]


@pytest.mark.parametrize(("text", "wanted"), CHANNELS)
@given(cuts=st.sets(st.integers(1, 150)))
def test_channels(text: str, wanted: tuple[str, str], cuts: set[int]) -> None:
    assert split(Channels(), cut(text, cuts)) == wanted


def test_parts_come_as_soon_as_they_are_certain() -> None:
    splitter = Thoughts()
    assert splitter.push("<think>a") == [Part("a", True)]
    assert splitter.push("b</thi") == [Part("b", True)]
    assert splitter.push("nk>\n") == []
    assert splitter.push("\nyes") == [Part("yes", False)]
    assert splitter.push(" and") == [Part(" and", False)]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory):
    def load(template: str, special: list[str]) -> Tokenizer:
        folder = Path(tmp_path_factory.mktemp("chat")) / "x"
        return load_tokenizer(str(made.chat_folder(folder, template, special)))

    return load


def test_the_prompt_says_how_a_reply_begins(load) -> None:
    question = [{"role": "user", "content": "the dog"}]
    plain = load(made.CHATML, made.CHATML_TOKENS)
    for variables, text, wanted in (
        ({}, "<think>hm</think>yes", ("hm", "yes")),
        ({"enable_thinking": False}, "yes", ("", "yes")),
    ):
        splitter = reply_splitter(plain, plain.chat.prompt(question, **variables))
        assert split(splitter, [text]) == wanted
    begun = load(made.CHATML.replace("<think>\n\n</think>\n\n", "<think>\n"), made.CHATML_TOKENS)
    prompt = begun.chat.prompt(question, enable_thinking=False)
    assert split(reply_splitter(begun, prompt), ["hm</think>", "yes"]) == ("hm", "yes")


def test_marks_that_are_special_tokens_are_seen(load) -> None:
    """`decode` leaves special tokens out: a thought between two of them is found all the same."""
    special = [*made.CHATML_TOKENS, "<think>", "</think>"]
    tokenizer = load(made.CHATML.replace("{% if enable", "<think>{% if enable"), special)
    assert tokenizer.decode(tokenizer.encode("<think>hm</think>")) == "hm"
    prompt = tokenizer.chat.prompt([{"role": "user", "content": "the dog"}])
    assert isinstance(splitter := reply_splitter(tokenizer, prompt), Thoughts)
    assert split(splitter, ["hm</think>yes"]) == ("hm", "yes")
    channels = load(made.HARMONY, made.HARMONY_TOKENS)
    prompt = channels.chat.prompt([{"role": "user", "content": "the dog"}])
    assert isinstance(reply_splitter(channels, prompt), Channels)
    assert isinstance(reply_splitter(dataclasses.replace(channels, chat=None), prompt), Thoughts)
