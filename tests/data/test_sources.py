"""What each kind of source yields, and the sentence for each way one can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest

from moe_jax.config.schema import DataConfig
from moe_jax.data import sources
from moe_jax.data.sources import ChatDocument, Line, find_source, read_documents, read_piece
from moe_jax.errors import UserError
from tests.support.imports import replace_import


def documents(source: Path | str, **changes: str) -> list[str]:
    return list(read_documents(DataConfig(source=str(source), **changes)))  # type: ignore[arg-type]


def write_parquet(path: Path, columns: dict[str, list[object]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_folder_is_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.md").write_text("two")
    (tmp_path / "a.txt").write_bytes("één\r\n".encode())
    (tmp_path / "c.jsonl").write_text('{"text": "three"}\n\n{"text": "four"}')
    write_parquet(tmp_path / "d.parquet", {"text": ["five", "six"]})
    (tmp_path / "ignored.bin").write_bytes(b"\x80")
    assert documents(tmp_path) == ["één\r\n", "two", "three", "four", "five", "six"]


@pytest.mark.parametrize("size", [1, 7, 40, 300])
def test_pieces_hold_every_document_once(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": "x" * (7 * i % 50) + str(i)} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.txt").write_text("whole\n" * 20)
    table = pyarrow.table({"text": [row["text"] for row in rows]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet", row_group_size=7)
    whole = documents(tmp_path)
    assert len(whole) == 81
    monkeypatch.setattr(sources, "PIECE_BYTES", size)
    config = DataConfig(source=str(tmp_path))
    source = find_source(config)
    assert [text for piece in source.pieces for text in read_piece(config, piece)] == whole
    assert len(source.pieces) > 3 and len(source.identity) == 3
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{")
    with pytest.raises(UserError, match=r"line 41 of .*a\.jsonl is not valid JSON"):
        documents(tmp_path)
    rows[30]["text"] = 5  # type: ignore[assignment]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"not text in line 31 of .*a\.jsonl"):
        documents(tmp_path)
    (tmp_path / "a.jsonl").unlink()
    table = pyarrow.table({"text": [*["x"] * 36, None, "y"]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet", row_group_size=7)
    with pytest.raises(UserError, match=r"not text in row 37 of .*c\.parquet"):
        documents(tmp_path)


def test_hidden_files_are_passed_over_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a desktop, an editor or version control leaves: no text, or a copy of held-out text."""
    root = tmp_path / ".texts"  # which was named, so that it is not hidden
    for folder in (".ipynb_checkpoints", ".git/hooks", "sub"):
        (root / folder).mkdir(parents=True)
    (root / "a.txt").write_text("one")
    (root / "sub" / "b.md").write_text("two")
    (root / "._a.txt").write_bytes(b"\x00\x05\x16\x07\x80Mac OS X")
    (root / "sub" / ".b.md.swp").write_bytes(b"\x80")
    (root / ".ipynb_checkpoints" / "a-checkpoint.txt").write_text("a draft of one")
    (root / ".git" / "hooks" / "c.py").write_text("hook")
    assert documents(root) == ["one", "two"]
    said = f"data.source: hidden files are passed over: {root}/._a.txt and 2 more.\n"
    assert capsys.readouterr().err == said
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / ".a.txt").write_text("one")
    assert documents(root / "sub") == ["two"] and capsys.readouterr().err == ""
    with pytest.raises(UserError, match=r"without any \.txt, .* file that is not hidden"):
        documents(root / ".." / "hidden")


def test_what_else_is_passed_over_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text that somebody meant to train on may be among it: compressed, or behind a link."""
    root, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    for folder in (root, elsewhere):
        folder.mkdir()
    for name in ("a.jsonl.gz", "b.csv"):
        (root / name).write_bytes(b"x")
    (root / "c.txt").write_text("one")
    (elsewhere / "d.txt").write_text("two")
    (root / "more").symlink_to(elsewhere)
    (root / "e.txt").symlink_to(elsewhere / "d.txt")
    assert documents(root) == ["one", "two"]
    assert capsys.readouterr().err == (
        "data.source: files other than .txt, .md, .py, .jsonl, .parquet are passed over: "
        f"{root}/a.jsonl.gz and 1 more.\n"
        f"data.source: linked folders are passed over: {root}/more.\n"
    )
    (elsewhere / "d.txt").unlink()
    with pytest.raises(UserError, match=r"e\.txt is a link to .*d\.txt, which is not there"):
        documents(root)


def test_text_field_is_chosen(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "x", "text": "y"}))
    assert documents(tmp_path / "a.jsonl", text_field="body") == ["x"]
    write_parquet(tmp_path / "a.parquet", {"text": ["y"], "body": ["x"]})
    assert documents(tmp_path / "a.parquet", text_field="body") == ["x"]


def test_conversations(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    shared = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    rows = [{"messages": said}, {"text": "plain"}, {"conversations": shared}]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert documents(file) == [
        ChatDocument(said, Line(file, 0, 1)),
        "plain",
        ChatDocument(said, Line(file, 0, 3)),
    ]
    # A field that is named wins, and may hold a conversation itself.
    file.write_text(json.dumps({"text": "x", "talk": said, "messages": []}))
    assert documents(file) == ["x"]
    assert documents(file, text_field="talk") == [ChatDocument(said, Line(file, 0, 1))]
    table = write_parquet(
        tmp_path / "a.parquet", {"messages": [[*said, {"role": "tool", "content": None}]]}
    )
    (document,) = documents(table)
    assert document.messages == [*said, {"role": "tool", "content": None}]


@pytest.mark.parametrize(
    "messages",
    [["hi"], [{"role": "user"}], [{"content": "hi"}], [{"role": 1, "content": "hi"}], [[]]],
)
def test_what_is_no_conversation(messages: list[object], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    with pytest.raises(UserError, match=r"line 1 of .*a\.jsonl: its field 'messages' holds"):
        documents(tmp_path)


def test_lone_surrogates_become_question_marks(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}')
    assert documents(tmp_path) == ["a?b"]


def test_builtin_is_the_same_every_time() -> None:
    first = documents("builtin")
    assert first == documents("builtin")
    assert len(first) > 100


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"line 2 of .*a\.jsonl is not valid JSON"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "\xff"}\n',
            r"line 2 of .*a\.jsonl is not valid JSON",
        ),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": "y"}\n',
            r"data\.text_field='text' is not a field of line 2 of .*a\.jsonl: it has body",
        ),
        (
            "a.jsonl",
            b'["x"]\n',
            r"data\.text_field='text' is not a field of line 1 of .*a\.jsonl: it has no fields",
        ),
        (
            "a.jsonl",
            b'{"text": 3}\n',
            r"data\.text_field='text' is not text in line 1 of .*a\.jsonl \(int\)",
        ),
        ("a.txt", b"abc\xff", r"a\.txt is not UTF-8 text \(byte 3\)"),
        ("a.parquet", b"not parquet at all", r"a\.parquet cannot be read"),
        ("a.csv", b"x", r"data\.source=.*a\.csv.* not read: give \.txt, \.md"),
    ],
)
def test_wrong_files(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        documents(tmp_path / name)


def test_wrong_columns(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"data\.text_field='text' is not a field of .*: it has body, n"
    ):
        documents(write_parquet(tmp_path / "a.parquet", {"body": ["x"], "n": [1]}))
    with pytest.raises(
        UserError, match=r"data\.text_field='text' is not text in row 2 of .*\(null\)"
    ):
        documents(write_parquet(tmp_path / "a.parquet", {"text": ["x", None]}))


def test_missing_and_empty_places(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.source=.*nowhere\.txt' does not exist"):
        documents(tmp_path / "nowhere.txt")
    with pytest.raises(UserError, match=r"data\.source=.* is a folder without any \.txt"):
        documents(tmp_path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_unreadable_file(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_text("x")

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", refuse)
    with pytest.raises(UserError, match=rf"{name} cannot be read \(Permission denied\)"):
        documents(tmp_path / name)


@pytest.mark.parametrize(
    ("module", "name", "words"),
    [
        ("pyarrow", "a.parquet", "needs the `pyarrow` package: pip install pyarrow"),
        (
            "datasets",
            "hf:some/name",
            r"data\.source='hf:some/name' needs the `datasets` package: pip install datasets",
        ),
        ("pydoc_data.topics", "builtin", r"data\.source='builtin' needs the module pydoc_data"),
    ],
)
def test_packages_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str, words: str
) -> None:
    write_parquet(tmp_path / "a.parquet", {"text": ["x"]})
    replace_import(monkeypatch, module)
    with pytest.raises(UserError, match=words):
        documents(tmp_path / name if name.endswith("parquet") else name)


class Rows(list):
    """As much of a `datasets.Dataset` as is used."""

    column_names = ("text", "id")


def test_hub_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> Rows:
        if name != "some/name":
            raise RuntimeError(f"no dataset\n {name}")
        return Rows([{"text": f"{split} one", "id": 1}, {"text": "two", "id": 2}])

    replace_import(monkeypatch, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert documents("hf:some/name", split="test") == ["test one", "two"]
    with pytest.raises(
        UserError,
        match=r"data\.source='hf:other' with data\.split='train' cannot be loaded \(no dataset "
        r"other\)",
    ):
        documents("hf:other")
    with pytest.raises(
        UserError, match=r"data\.text_field='body' is not a field of hf:some/name: it has text, id"
    ):
        documents("hf:some/name", text_field="body")
    with pytest.raises(
        UserError, match=r"data\.text_field='id' is not text in row 1 of hf:some/name"
    ):
        documents("hf:some/name", text_field="id")
