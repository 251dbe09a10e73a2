"""Any model that can be opened, saved as it is held for inference (packed_checkpoint.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_jax.config.schema import MeshConfig
from moe_jax.errors import UserError
from moe_jax.inference.load import Preconditions, find_model
from moe_jax.inference.memory import device_bytes
from moe_jax.inference.packed_checkpoint import write_packed
from moe_jax.inference.read_weights import serving_tables
from moe_jax.model_io.packed_header import PACKED_FORMAT, PackedHeader
from moe_jax.model_io.source import PackedSource, find_local
from moe_jax.ops.quantized import Kind
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
    source = find_local(path)
    if isinstance(source, PackedSource):
        raise UserError(
            f"{path} is converted already: name the folder or the run that it was made from."
        )
    described = source.describe()
    stored = find_model(
        source.path,
        MeshConfig(),
        dtype=dtype,
        quantize=quantize,
        group=group,
        step=step,
        fallback=fallback,
        to_write=True,
    )
    Preconditions().require(stored)
    plan = stored.plan
    kind: Kind = quantize or "float"
    params, bias_LE = stored.read(False)
    size = gibibytes(sum(device_bytes(plan).values()))
    say(f"Writing {size} to {out}.")
    header = PackedHeader(
        format=PACKED_FORMAT,
        name=stored.name,
        model=plan.model,
        moe=plan.moe,
        vocab_size=plan.vocab_size,
        context=stored.context,
        eos_ids=stored.eos_ids,
        dtype=plan.dtype.name,
        quantization=kind,
        group=group,
        tokenizer="bytes" if described.tokenizer == "bytes" else "files",
    )
    bias = serving_tables(plan, bias_LE).bias_E
    write_packed(out, plan, params, bias, header, described.tokenizer, described.hf_config)
    held = plan.dtype.name if quantize is None else f"{quantize} and {plan.dtype.name}"
    return f"{out}: {size} of weights in {held}, from {path}."
