"""How fast text is prepared, beside the tokenizer's own rate: python scripts/benchmark_text.py
FILE.jsonl TOKENIZER.json

Both on one core and in processor time, in turns: `tokenizers`' encode_batch on texts that are in
memory already, and everything that `moe-jax data prepare` does with the file.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from moe_jax.config.schema import DataConfig
from moe_jax.data.prepare import prepare

REPEATS = 3


def processor_seconds(work: Callable[[], object]) -> float:
    """Seconds of processor time that a call takes."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main(source: str, spec: str) -> None:
    """Prints both rates and their ratio, the best of some runs."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(spec)
    with Path(source).open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    size = Path(source).stat().st_size

    def encode() -> None:
        for begin in range(0, len(texts), 1000):
            tokenizer.encode_batch(texts[begin : begin + 1000], add_special_tokens=False)

    def whole() -> None:
        with tempfile.TemporaryDirectory() as folder:
            prepare(DataConfig(source=source, tokenizer=spec), Path(folder) / "out")

    pairs = [(processor_seconds(encode), processor_seconds(whole)) for _ in range(REPEATS)]
    own, ours = (size / min(times) / 1e6 for times in zip(*pairs, strict=True))
    print(f"encode_batch {own:.2f} MB/s, data prepare {ours:.2f} MB/s per core: {ours / own:.2f} x")


if __name__ == "__main__":
    # Before the tokenizer is made; a process of its own, so that nothing else is set by it.
    if os.environ.get("TOKENIZERS_PARALLELISM") != "false":
        os.execve(
            sys.executable,
            [sys.executable, *sys.argv],
            {**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        )
    main(*sys.argv[1:])
