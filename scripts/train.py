"""Trains from a checkout: python scripts/train.py configs/tiny.yaml --set train.steps=50

The same as `moe-jax train`, with the same options (--help lists them).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moe_jax.cli.main import main
from moe_jax.runtime.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()
    main(["train", *sys.argv[1:]])
