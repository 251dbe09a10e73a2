"""Parquet files are closed however reading ends, and what is wrong with one is one sentence."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from moe_jax.config.schema import DataConfig
from moe_jax.data.parquet import open_parquet
from moe_jax.data.sources import read_documents
from moe_jax.errors import UserError
from moe_jax.forecasting.tables.read import Columns, read_series


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[pyarrow.parquet.ParquetFile]:
    """The files that were opened."""
    files = []
    own = pyarrow.parquet.ParquetFile

    def open_file(path: Path) -> pyarrow.parquet.ParquetFile:
        files.append(own(path))
        return files[-1]

    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", open_file)
    return files


def unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path.name} is broken: {error}")


def test_readers_close_their_files(
    tmp_path: Path, opened: list[pyarrow.parquet.ParquetFile]
) -> None:
    path = tmp_path / "a.parquet"
    columns = {"text": ["x", "y"], "timestamp": [1, 2], "target": [0.0, 1.0]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    items = read_series(path, Columns()).items
    assert [item.target.tolist() for item in items] == [[[0.0, 1.0]]]
    documents = read_documents(DataConfig(source=str(path)))
    assert next(documents) == "x"
    documents.close()  # before its end
    assert len(opened) >= 3 and all(file.closed for file in opened)


def test_errors_of_a_file_are_said_as_the_caller_does(
    tmp_path: Path, opened: list[pyarrow.parquet.ParquetFile]
) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"a\.parquet is broken"), open_parquet(path, unreadable):
        pass
    table = pyarrow.table({"timestamp": [*range(20_000)], "target": [*range(20_000)]})
    pyarrow.parquet.write_table(table, path)
    content = bytearray(path.read_bytes())
    content[20:2000] = bytes(1980)  # a page; the footer is whole
    path.write_bytes(content)
    with (
        pytest.raises(UserError, match=r"a\.parquet is broken"),
        open_parquet(path, unreadable) as file,
    ):
        list(file.iter_batches())
    assert len(opened) == 1 and opened[0].closed
    with pytest.raises(UserError, match=r"a\.parquet cannot be read as a table"):
        list(read_series(path, Columns()).items)
