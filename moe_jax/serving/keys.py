"""API keys, from the file that --api-key-file names."""

from __future__ import annotations

import stat
from pathlib import Path

from moe_jax.errors import UserError


def read_keys(path: Path) -> list[bytes]:
    """The API keys of a file, one per line.

    Raises UserError for a file that cannot be read, has no key, or that everybody may read.
    """
    try:
        mode = path.stat().st_mode
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"--api-key-file {path} cannot be read ({error.strerror}): name a file with a key."
        ) from error
    if mode & stat.S_IROTH:
        raise UserError(
            f"--api-key-file {path} can be read by everybody on this machine: chmod 600 {path}."
        )
    keys = [line.strip() for line in content.splitlines() if line.strip()]
    if not keys:
        raise UserError(f"--api-key-file {path} is empty: write a key into it, one per line.")
    return keys
