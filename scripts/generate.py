"""Text from a model, from a checkout: python scripts/generate.py path/to/model --prompt "def "

The same as `moe-jax generate`, with the same options (--help lists them). On one device, as on a
Mac, nothing needs to be said about devices.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moe_jax.cli.main import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
