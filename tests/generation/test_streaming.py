"""Text from tokens: whole characters, spaces between words, stop strings that are split over tokens
in any way.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from moe_jax.data.tokenizer import Tokenizer, load_tokenizer
from moe_jax.errors import UserError
from moe_jax.generation.streaming import TextStream
from tests.support.tokenizers import train_tokenizer

BYTES = load_tokenizer("bytes")


def pieces(tokens: list[int], tokenizer: Tokenizer = BYTES, **options: object) -> list[str]:
    stream = TextStream(tokenizer, **options)
    shown = []
    for token in tokens:
        shown.append(stream.push(token))
        if stream.stopped:
            break
    return [piece for piece in [*shown, stream.finish()] if piece]


def test_a_character_of_several_tokens_comes_out_whole() -> None:
    text = "a\u00e9\u4e13\U0001f600!"
    assert pieces(list(text.encode())) == list(text)


def test_an_unfinished_character_at_the_end_is_not_lost() -> None:
    assert "".join(pieces(list("a\u4e13".encode())[:3])) == "a\N{REPLACEMENT CHARACTER}"


def test_bytes_that_are_no_character_do_not_stop_the_text() -> None:
    assert (
        "".join(pieces(list(b"a\xffb\xfe")))
        == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}"
    )


@given(st.text(), st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_what_is_shown_is_the_text_up_to_the_stop_string_that_is_complete_first(
    text: str, stop: list[str]
) -> None:
    ends = sorted((text.find(one) + len(one), text.find(one)) for one in stop if one in text)
    assert "".join(pieces(list(text.encode()), stop=stop)) == (text[: ends[0][1]] if ends else text)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one\n\ntwo", ["\n\n"], ["o", "n", "e"]),
        ("a\nb", ["\n\n"], ["a", "\nb"]),  # a line break is held until it is known
        ("a\n", ["\n\n"], ["a", "\n"]),
        ("ababac", ["abac"], ["ab"]),
        ("xEND", ["END", "N"], ["x", "E"]),
        ("xEx", ["END", "N"], ["x", "Ex"]),
        ("END", ["END"], []),
    ],
)
def test_stop_strings_are_never_seen(text: str, stop: list[str], expected: list[str]) -> None:
    assert pieces(list(text.encode()), stop=stop) == expected


def test_a_stop_string_within_one_token(words: Tokenizer) -> None:
    assert "".join(pieces(words.encode(" once upon a time"), words, stop=["po"])) == "once u"


def test_stop_strings_may_hold_special_tokens(tmp_path: Path) -> None:
    file = train_tokenizer(tmp_path / "tokenizer.json", ["<|im_end|>", "<|end|>"])
    tokenizer = load_tokenizer(str(file))

    def said(text: str, *stop: str) -> str:
        return "".join(pieces(tokenizer.encode(text), tokenizer, stop=stop))

    text = "the dog<|end|> sleeps<|im_end|>\nthe fox<|im_end|>\n\nend"
    assert said(text, "<|im_end|>") == "the dog sleeps"
    assert said(text, "<|im_end|>\n") == "the dog sleeps"
    assert said(text, "<|im_end|>\n\n") == "the dog sleeps\nthe fox"
    assert said(text, "fox<|im_end|>") == "the dog sleeps\nthe "
    assert said(text, "<|im_end|>", "<|end|> ") == "the dog"
    assert said(text, "never<|im_end|>") == said(text) == "the dog sleeps\nthe fox\n\nend"
    # Of a special token only the whole is a mark: a stop string that is a part of it is text.
    assert said(text, "end") == "the dog sleeps\nthe fox\n\n"


def test_marks_are_in_the_text_and_other_special_tokens_are_not(tmp_path: Path) -> None:
    file = train_tokenizer(tmp_path / "tokenizer.json", ["<a>", "<b>"])
    tokenizer = load_tokenizer(str(file))
    tokens = tokenizer.encode("<a> the<b> dog<a>")
    assert "".join(pieces(tokens, tokenizer, marks=["<a>"])) == "<a> the dog<a>"
    assert "".join(pieces(tokens, tokenizer, marks=["<a>"], stop=["dog<a>"])) == "<a> the "
    ids = [tokenizer.encode("\u4e13")[0], *tokenizer.encode("<a>x")]  # half a character
    assert "".join(pieces(ids, tokenizer, marks=["<a>"])) == "\N{REPLACEMENT CHARACTER}<a>x"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UserError, match="--stop is empty"):
        TextStream(BYTES, stop=["x", ""])


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer as Llama's: words with the space before them, which is dropped where nothing
    comes before, and bytes.
    """
    names = [
        "<unk>",
        "</s>",
        "\u2581",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"abcdefghijklmnopqrstuvwxyz",
    ]
    names += ["\u2581once", "\u2581upon", "\u2581a", "\u2581time"]
    inner = tokenizers.Tokenizer(
        models.Unigram([(name, -1.0) for name in names], unk_id=0, byte_fallback=True)
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    path = Path(tmp_path_factory.mktemp("words")) / "tokenizer.json"
    inner.save(str(path))
    return load_tokenizer(str(path))


def test_spaces_between_words_stay(words: Tokenizer) -> None:
    tokens = words.encode("once upon a time")
    assert len(tokens) == 4
    assert pieces(tokens, words) == ["once", " upon", " a", " time"]
    assert pieces(tokens[2:], words) == ["a", " time"]  # alone
    assert pieces(tokens[2:], words, after=tokens[:2]) == [" a", " time"]  # going on


def test_bytes_among_words(words: Tokenizer) -> None:
    text = "a time \u4e13\u5bb6 once\U0001f600"
    tokens = words.encode(text)
    assert "".join(pieces(tokens, words)) == text
    for cut in range(len(tokens)):
        before = words.decode(tokens[:cut])
        if not before.endswith("\N{REPLACEMENT CHARACTER}"):
            assert before + "".join(pieces(tokens[cut:], words, after=tokens[:cut])) == text
