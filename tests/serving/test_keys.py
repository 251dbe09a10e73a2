"""Files with keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_jax.errors import UserError
from moe_jax.serving.keys import read_keys


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(UserError, match="cannot be read"):
        read_keys(path)
    path.write_text("\n")
    path.chmod(0o600)
    with pytest.raises(UserError, match="is empty"):
        read_keys(path)
    path.write_text("one\n two \n")
    assert read_keys(path) == [b"one", b"two"]
    path.chmod(0o644)
    with pytest.raises(UserError, match=f"chmod 600 {path}"):
        read_keys(path)
