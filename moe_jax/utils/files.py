"""Paths as people write them, and writing a file or a folder whole or not at all.

    local_path("~/runs/first")             # /home/me/runs/first; refuses gs://bucket/run
    replace_text(run_dir / "config.yaml", text)
    with new_folder(out) as part:          # OUT.part, which becomes OUT when the block ends
        (part / "config.json").write_text(text)

What is being written has the suffix `.part`: a killed write leaves nothing else behind.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_jax.errors import UserError

PART = ".part"
# What file systems answer that have no locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# What a model's folder and a prepared text are known by.
KNOWN_BY = ("config.json", "config.yaml", "moe_jax.json", "prepared.json")

_URL = r"[A-Za-z][A-Za-z0-9+.-]+:/"  # Path writes gs://bucket as gs:/bucket


_LEFT_BY_SYSTEM = r"\.DS_Store|\._.*|\.nfs.*|\.fuse_hidden.*|Thumbs\.db|desktop\.ini"


def is_left_by_system(path: Path) -> bool:
    """Whether a desktop or a network file system leaves such a file in any folder it shows."""
    return re.fullmatch(_LEFT_BY_SYSTEM, path.name) is not None


def local_path(path: str | Path) -> Path:
    """The path with `~` and `~name` as the home folders they stand for.

    Raises UserError for a URL, because all that is read and written is on file systems of this
    machine, and for the home of nobody.
    """
    if re.match(_URL, str(path)):
        raise UserError(
            f"{path} is a URL, and only paths of this machine are read and written: mount a bucket "
            f"(gcsfuse, mount-s3) and give the folder; a model on the hub is named as org/name."
        )
    expanded = os.path.expanduser(path)
    if str(path).startswith("~") and expanded == str(path):
        raise UserError(
            f"{path}: there is no such home folder: write the path out, or ./{path} for a name "
            f"that begins with ~."
        )
    return Path(expanded)


def is_hub_name(path: Path) -> bool:
    """Whether a path may be the name of a model on the Hugging Face hub: OWNER/NAME, with nothing
    of that name here, and not that of a mistyped configuration.
    """
    name = path.as_posix()
    shaped = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None
    return shaped and not name.endswith((".yaml", ".yml")) and not path.exists()


def download_again(path: Path) -> str:
    """What to do about a file that is not what its name says: a clone without Git LFS has pointers
    of a few lines in place of its large files, and cloned again it would have them again.
    """
    with path.open("rb") as file:
        pointer = file.read(20) == b"version https://git-"
    return (
        "it is a pointer of Git LFS, so run `git lfs pull` in its folder"
        if pointer
        else "download it again"
    )


def replace_text(path: Path, text: str, *, durable: bool = False) -> None:
    """`replace_bytes` of a text in UTF-8."""
    replace_bytes(path, text.encode(), durable=durable)


def replace_bytes(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Writes a file in the place of an old one, if any; with `durable` it has reached the disk.

    What reads the path meanwhile sees the old file or the new one.
    """
    part = path.with_name(path.name + PART)
    with part.open("wb") as file:
        file.write(content)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.replace(part, path)


def read_characters(path: Path) -> str:
    """The characters of a text in UTF-8, line ends as they are, without a byte order mark.

    Raises UnicodeDecodeError for another encoding, and OSError.
    """
    return path.read_bytes().decode("utf-8-sig")


def rename_folder(part: Path, whole: Path) -> None:
    """Gives a finished folder its name.

    Where the file system does not rename folders (a bucket mounted by gcsfuse, some network
    folders), its files are moved one by one, last those by which it is known for what it is.
    """
    try:
        part.rename(whole)
        return
    except OSError:
        if not part.is_dir() or whole.exists():
            raise
    files = [path.relative_to(part) for path in part.rglob("*") if path.is_file()]
    for file in sorted(files, key=lambda file: str(file) in KNOWN_BY):
        (whole / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(part / file, whole / file)
    shutil.rmtree(part)


def refuse_existing(out: Path) -> None:
    """Raises UserError where there is something already, which is never overwritten unasked."""
    if out.exists():
        raise UserError(f"{out} exists already: name another folder, or delete it.")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """The folder to write into, which becomes the new folder `out` when the block ends well.

    Nothing is left of one that fails, or of an earlier one that was killed. Raises UserError where
    `out` exists.
    """
    refuse_existing(out)
    part = out.with_name(out.name + PART)
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)
    try:
        yield part
        rename_folder(part, out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


@contextmanager
def exclusive(path: Path, *, wait: bool) -> Iterator[bool]:
    """Holds the lock of a file, which is made; gives whether it could: with `wait` always, else
    not where another process holds it.

    The system keeps the lock (flock), so it ends with its process. A file system without locks
    gives True.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            held = False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise OSError(error.errno, error.strerror, str(path)) from error
            held = True
        else:
            held = True
        yield held
