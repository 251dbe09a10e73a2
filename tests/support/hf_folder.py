"""A small Hugging Face folder as a person has one: weights, config.json, and a tokenizer whose
tokens are bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_jax.data.tokenizer_files import write_byte_tokenizer
from tests.support import hf_cases as cases

VOCAB = 264
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def make_folder(case: str, folder: Path, **config: Any) -> Path:
    """The case of tests/hf/cases with a vocabulary that holds all bytes, and whatever else `config`
    changes.
    """
    description = cases.describe(case)
    description["config"] |= {"vocab_size": VOCAB, "eos_token_id": 256} | config
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in description["tensors"]:
            description["tensors"][name][0] = VOCAB
    cases.write_checkpoint(description, case, folder)
    write_byte_tokenizer(folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": TEMPLATE}))
    (folder / "modeling.py").write_text("raise SystemExit('code of a checkpoint was run')")
    return folder
