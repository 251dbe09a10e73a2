"""Models on the Hugging Face hub: downloaded, or the headers of their weights alone.

    folder = download("Qwen/Qwen3-30B-A3B")       # the folder in the hub's own cache
    fetch_headers("Qwen/Qwen3-30B-A3B")           # some MB of the 61 GB

Needs the standard library until it is called.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moe_jax.errors import UserError

if TYPE_CHECKING:
    from moe_jax.hf.safetensors import Shards

DESCRIBING = ("config.json", "generation_config.json")
FILES = ("*.json", "model*.safetensors", "*.jinja", "*.txt", "tokenizer.model")
COPIES = ("*/*",)  # folders with the same weights in other forms
_NO_SAFETENSORS = (
    "the hub's model of that name has no model.safetensors: choose one that has; pickles are never "
    "loaded."
)


def download(name: str, field: str = "") -> Path:
    """The folder of the hub's cache with a model, of which only what is missing is fetched.

    Raises UserError, which begins with `field`, where the model cannot be had.
    """
    from huggingface_hub import HfApi

    with _explained(name, field):
        folder = Path(
            HfApi().snapshot_download(
                name, allow_patterns=list(FILES), ignore_patterns=list(COPIES)
            )
        )
    if not any(folder.glob("*.safetensors")):
        raise _refused(name, field, _NO_SAFETENSORS)
    return folder


def fetch_headers(name: str, field: str = "") -> tuple[Path, Shards]:
    """A folder with the model's config.json, and what the headers of its safetensors say: in the
    folder where it holds the weights, downloaded earlier, else on the hub. No more is fetched.

    Raises UserError, which begins with `field`, where the model cannot be had.
    """
    from huggingface_hub import HfApi

    from moe_jax.hf.safetensors import Entry, Shards

    hub = HfApi()
    with _explained(name, field):
        folder = Path(hub.snapshot_download(name, allow_patterns=list(DESCRIBING)))
        if downloaded := _downloaded(folder):  # which needs no network
            return folder, downloaded
        # The folder is named by the commit, so that all files are of one.
        weights = hub.get_safetensors_metadata(name, revision=folder.name)
    entries = {
        tensor: Entry(folder / file, info.dtype, tuple(info.shape), info.data_offsets[0])
        for file, header in weights.files_metadata.items()
        for tensor, info in header.tensors.items()
        if weights.weight_map.get(tensor) == file
    }
    return folder, Shards(entries)


def _downloaded(folder: Path) -> Shards | None:
    """The weights in a folder that holds all that it should."""
    from moe_jax.hf.safetensors import Shards

    try:
        shards = Shards(folder)
    except UserError:
        return None
    return shards if shards.entries else None


def name_of(folder: Path) -> str:
    """What to call the model in a folder: its name, on the hub where the folder is in its cache."""
    folder = folder.resolve()
    cached = re.fullmatch(r"models--(?:.+--)?(.+)", folder.parent.parent.name)
    return cached[1] if cached and folder.parent.name == "snapshots" else folder.name


@contextlib.contextmanager
def _explained(name: str, field: str) -> Iterator[None]:
    """Turns what the hub and the network refuse into a sentence."""
    try:
        yield
    except UserError:
        raise
    # no network, no such model, no leave: errors of several libraries, with no common base
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # which the command explains
        raise _refused(name, field, _cause(name, error)) from error


def _refused(name: str, field: str, cause: str) -> UserError:
    return UserError(f"{field}{name} is no folder here, and {cause}")


def _cause(name: str, error: Exception) -> str:
    from huggingface_hub import errors

    chain = list(_chain(error))
    if any(isinstance(one, errors.OfflineModeIsEnabled) for one in chain):
        return (
            "the model of that name is not in the hub's cache while HF_HUB_OFFLINE forbids to "
            "download it: unset that, or name a folder."
        )
    if any(isinstance(one, errors.GatedRepoError) for one in chain):
        return (
            f"the hub gives the model of that name only to those who asked: ask at "
            f"https://huggingface.co/{name}, then `hf auth login` or set HF_TOKEN."
        )
    if any(isinstance(one, errors.RepositoryNotFoundError) for one in chain):
        return (
            "the hub has no model of that name, or a private one: correct the path or the name, "
            "or `hf auth login`."
        )
    if any(isinstance(one, errors.NotASafetensorsRepoError) for one in chain):
        return _NO_SAFETENSORS
    # httpx and httpx2 call what never got an answer TransportError.
    if any(base.__name__ == "TransportError" for one in chain for base in type(one).__mro__):
        return (
            f"the hub, which may have a model of that name, cannot be reached "
            f"({_text(chain[-1])}): name a folder, or try again with a network."
        )
    return f"the hub gave no model of that name ({_text(error)}): correct the name, or try again."


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _text(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
