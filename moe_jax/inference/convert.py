"""A model saved as it is held for inference (converted.py), from any form that it can be opened
in.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from moe_jax.errors import UserError
from moe_jax.inference import packed_checkpoint
from moe_jax.inference.engine import Engine
from moe_jax.inference.load import find_folder, open_model
from moe_jax.inference.memory import device_bytes
from moe_jax.model_io.source import HUB_NAME, PackedSource, find
from moe_jax.utils.files import refuse_existing
from moe_jax.utils.progress import say
from moe_jax.utils.units import gibibytes


def convert(
    path: Path,
    out: Path,
    *,
    dtype: str | None,
    quantize: Any,
    group: int,
    step: int | None,
    fallback: bool,
) -> str:
    """Opens a Hugging Face folder or a run on one device and writes it to the new folder `out`;
    returns a sentence about it.

    Arguments as those of `open_model`. The device holds the whole model while it is written. Raises
    UserError for what cannot be opened, where `out` exists, and where its disk has no room; nothing
    is left of `out` then.
    """
    refuse_existing(out)
    if not path.exists() and not re.fullmatch(HUB_NAME, str(path)):
        raise UserError(f"{path} does not exist: give a Hugging Face folder or a run directory.")
    path = find_folder(path)
    source = find(path)
    if isinstance(source, PackedSource):
        raise UserError(
            f"{path} is converted already: name the folder or the run that it was made from."
        )
    described = source.describe()
    loaded = open_model(
        path, dtype=dtype, quantize=quantize, group=group, step=step, fallback=fallback
    )
    assert isinstance(loaded.engine, Engine)  # experts were not asked to stay on the host
    size = gibibytes(sum(device_bytes(loaded.engine).values()))
    say(f"Writing {size} to {out}.")
    packed_checkpoint.write_packed(
        out, loaded, described.tokenizer, group, quantize or "float", described.hf_config
    )
    kept = (
        loaded.engine.dtype.name
        if quantize is None
        else f"{quantize} and {loaded.engine.dtype.name}"
    )
    return f"{out}: {size} of weights in {kept}, from {path}."
