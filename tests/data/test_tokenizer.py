"""Round trips through each kind of tokenizer, the ids that mean nothing, and what cannot be
read.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.config.schema import DataConfig
from moe_jax.data.corpus import load_corpus
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.data.tokenizer_files import copy_tokenizer
from moe_jax.errors import UserError
from tests.support import ROOT
from tests.support.imports import replace_import
from tests.support.texts import tokens_of
from tests.support.tokenizers import SAMPLE, chat_folder, save_folder, train_tokenizer

TORCHTITAN = ROOT.parent / "shared" / "data" / "tokenizers" / "torchtitan_test_tokenizer.json"


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bytes_ids() -> None:
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.num_ids, tokenizer.eos_id, tokenizer.vocab_size) == (257, 256, 264)
    assert (
        tokenizer.decode([104, 256, 105, 257, 263]) == "hi"
    )  # the end and the padding ids are no text
    assert tokenizer.decode([0xC3, 0x28]) == "\ufffd("
    assert tokenizer.encode("a\ud800") == [97, 63]


@pytest.mark.parametrize("text", ["the quick dog", "  two\n spaces", "été 漢字 🙂", ""])
def test_file_round_trip(tmp_path: Path, text: str) -> None:
    tokenizer = load_tokenizer(str(train_tokenizer(tmp_path / "tokenizer.json", ["</s>"])))
    ids = tokenizer.encode(text)
    assert 0 not in ids  # no start token, and nothing cut off or padded
    assert tokenizer.decode([*ids, tokenizer.eos_id, tokenizer.vocab_size - 1]) == text
    assert [list(row) for row in tokenizer.encode_batch([text, "x"])] == [
        ids,
        tokenizer.encode("x"),
    ]


def test_end_of_document(tmp_path: Path) -> None:
    named = load_tokenizer(str(train_tokenizer(tmp_path / "named.json", ["</s>"])))
    assert (named.eos_id, named.num_ids) == (1, 277)
    unnamed = load_tokenizer(str(train_tokenizer(tmp_path / "unnamed.json", [])))
    assert (unnamed.eos_id, unnamed.num_ids, unnamed.vocab_size) == (277, 278, 280)
    assert named.fingerprint != unnamed.fingerprint


def test_a_file_is_the_same_tokenizer_alone_in_a_folder(tmp_path: Path) -> None:
    """As a run keeps it, and beside the config.json of an export: the same ids, the same end of a
    document, the same hash of the corpus.
    """
    for name, special in (("named", ["</s>"]), ("unnamed", []), ("exported", ["</s>"])):
        file = train_tokenizer(tmp_path / f"{name}.json", special)
        copy_tokenizer(str(file), tmp_path / name)
        if name == "exported":
            (tmp_path / name / "config.json").write_text('{"model_type": "qwen3_moe"}')
        first, after = load_tokenizer(str(file)), load_tokenizer(str(tmp_path / name))
        assert after.fingerprint == first.fingerprint
        assert (after.num_ids, after.eos_id) == (first.num_ids, first.eos_id)
        assert (after.start_ids, after.special_ids) == (first.start_ids, first.special_ids)
        assert after.encode_prompt("the dog") == first.encode_prompt("the dog")


@pytest.mark.parametrize(
    "name",
    ["<\uff5cend\u2581of\u2581sentence\uff5c>", "<seed:eos>", "<EOS_TOKEN>", "<|endoftext|>"],
)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_end_of_a_document_that_nothing_names(name: str, kind: str, tmp_path: Path) -> None:
    """A tokenizer.json has no field for it, and a tokenizer_config.json may leave it out."""
    folder = chat_folder(tmp_path / "saved", "", ["<other>", name])
    tokenizer = load_tokenizer(str(folder / "tokenizer.json" if kind == "file" else folder))
    assert (tokenizer.eos_id, tokenizer.special_ids[name]) == (2, 2)
    assert tokenizer.end_ids == (2,) and tokenizer.num_ids == 277


@pytest.mark.parametrize("settings", ["alone", "with settings"])
@pytest.mark.parametrize(
    ("files", "end"),
    [
        ({"config.json": {"eos_token_id": 2}}, 2),
        (
            {
                "config.json": {"eos_token_id": 3},
                "generation_config.json": {"eos_token_id": [2, 1]},
            },
            2,
        ),
        ({"config.json": {"eos_token_id": 277}}, 277),  # a token that there is not: an id more
        ({"config.json": {"eos_token_id": None}}, 277),
        ({"config.json": {}}, 277),
    ],
)
def test_the_end_of_a_document_that_the_models_config_names(
    files: dict[str, object], end: int, settings: str, tmp_path: Path
) -> None:
    folder = chat_folder(tmp_path / "saved", "", ["<a>", "<b>", "<c>"])
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    if settings == "alone":
        (folder / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.eos_id, tokenizer.num_ids) == (end, 278 if end == 277 else 277)


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize(
    ("post", "start"),
    [("$A </s>", []), ("<bos> $A </s>", [0]), ("<bos> $A", [0]), ("$A", []), (None, [0])],
)
def test_what_is_appended_to_a_text_is_not_to_a_prompt(
    post: str | None, start: list[int], kind: str, tmp_path: Path
) -> None:
    folder = chat_folder(tmp_path / "saved", "", ["</s>"], post)
    tokenizer = load_tokenizer(str(folder / "tokenizer.json" if kind == "file" else folder))
    for text in ("the dog", "a", "</s>", "<bos></s>"):
        ids = tokenizer.encode(text)
        assert tokenizer.encode_prompt(text) == [*start, *ids]
    assert tokenizer.encode("x</s>")[-1] == 1


def test_special_tokens_that_the_settings_do_not_list(tmp_path: Path) -> None:
    folder = chat_folder(tmp_path / "saved", "", ["<|im_end|>"])
    for path in (folder, folder / "tokenizer.json"):
        assert load_tokenizer(str(path)).special_ids == {"<bos>": 0, "<|im_end|>": 1}


def test_folder(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(save_folder(tmp_path / "saved")))
    assert (tokenizer.eos_id, tokenizer.num_ids) == (
        1,
        278,
    )  # transformers adds the padding token that the file names
    text = "the quick dog , été ."
    ids = tokenizer.encode(text)
    assert len(ids) > 4 and 0 not in ids
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == text
    assert ids == load_tokenizer(str(tmp_path / "saved" / "tokenizer.json")).encode(text)


def test_corpus_through_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(SAMPLE)
    path = train_tokenizer(tmp_path / "tokenizer.json", ["</s>"])
    corpus = load_corpus(
        DataConfig(source=str(tmp_path / "a.txt"), tokenizer=str(path)), seq_len=8, seed=0
    )
    parts = (*corpus.train.parts, *corpus.validation.parts)
    tokens = [token for part in parts for token in tokens_of(part).tolist()]
    assert corpus.tokenizer.decode(tokens) == SAMPLE
    assert (
        corpus.hash
        != load_corpus(DataConfig(source=str(tmp_path / "a.txt")), seq_len=8, seed=0).hash
    )


def test_torchtitan_file() -> None:
    if not TORCHTITAN.exists():
        pytest.skip(f"{TORCHTITAN} is not here")
    tokenizer = load_tokenizer(str(TORCHTITAN))
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (2004, 2024)
    assert tokenizer.decode(tokenizer.encode("plain")) == "plain"


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.tokenizer='gpt2' does not exist"):
        load_tokenizer("gpt2")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(
        UserError, match=r"data\.tokenizer=.*tokenizer\.json' cannot be read as a tokenizer"
    ):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    for _ in range(2):  # alone in its folder, and beside its settings
        with pytest.raises(
            UserError, match=r"data\.tokenizer=.* cannot be read as a tokenizer"
        ) as raised:
            load_tokenizer(str(tmp_path))
        assert "\n" not in str(raised.value)
        (tmp_path / "tokenizer_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("module", "name"), [("tokenizers", "tokenizer.json"), ("transformers", "")]
)
def test_packages_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_text("{}")
    replace_import(monkeypatch, module)
    with pytest.raises(UserError, match=f"needs the `{module}` package: pip install {module}"):
        load_tokenizer(str(tmp_path / name))


def test_code_in_a_folder_is_not_run(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "saved")
    (folder / "tokenization_mine.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n"
    )
    settings = {
        "tokenizer_class": "Mine",
        "auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    try:
        load_tokenizer(str(folder))
    except UserError as error:
        assert "data.tokenizer=" in str(error)
    assert not (tmp_path / "ran").exists()


def test_a_pointer_of_git_lfs_is_said_to_be_that(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1234\n"
    (tmp_path / "tokenizer.json").write_text(pointer, encoding="utf-8")
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(UserError, match=r"tokenizer\.json: it is a pointer of Git LFS, so run"):
            load_tokenizer(str(place))
