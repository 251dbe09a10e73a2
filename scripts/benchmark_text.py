"""How fast text is prepared beside the tokenizer's own rate: python scripts/benchmark_text.py
FILE.jsonl TOKENIZER.json

On one core and in processor time: what `moe-jax data prepare` does with a file, and the part of
that which `tokenizers` takes to encode batches. Both come from one run, because a shared machine
changes its speed between two.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from moe_jax.config.schema import DataConfig
from moe_jax.data.encode import encode_piece
from moe_jax.data.prepared import write_shard
from moe_jax.data.sources import find_source
from moe_jax.data.tokenizer import load_tokenizer


def main(source: str, spec: str) -> None:
    """Prints both rates and their ratio."""
    import tokenizers

    inner = tokenizers.Tokenizer.from_file(spec)
    own = 0.0

    def encode_batch(texts: Sequence[str]) -> list[list[int]]:
        nonlocal own
        began = time.process_time()
        encodings = inner.encode_batch_fast(list(texts), add_special_tokens=False)
        own += time.process_time() - began
        return [encoding.ids for encoding in encodings]

    config = DataConfig(source=source, tokenizer=spec)
    tokenizer = dataclasses.replace(load_tokenizer(spec), encode_batch=encode_batch)
    began = time.process_time()
    text = find_source(config)
    with tempfile.TemporaryDirectory() as folder:
        for number, piece in enumerate(text.pieces):
            write_shard(Path(folder), number, encode_piece(piece, tokenizer, config))
    whole = time.process_time() - began
    rates = [text.size / seconds / 1e6 for seconds in (own, whole)]
    print(
        f"encode_batch_fast {rates[0]:.2f} MB/s, data prepare {rates[1]:.2f} MB/s per core: "
        f"{own / whole:.2f} x"
    )


if __name__ == "__main__":
    # One thread; set for a process of its own, before the tokenizer is made.
    if os.environ.get("TOKENIZERS_PARALLELISM") != "false":
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    main(*sys.argv[1:])
