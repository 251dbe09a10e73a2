"""Copies the files of a tokenizer, and writes our byte tokenizer as such files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from moe_jax.errors import UserError
from moe_jax.utils.files import local_path

# What transformers or tokenizers may read; config.json can be the only file that names the class of
# the tokenizer.
PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "config.json",
)
_NEVER = (".py", ".bin", ".pt", ".pth", ".pkl")  # code and pickles are not passed on
_END = "<|endoftext|>"
BYTES_EOS = 256  # the byte tokenizer's end of a document


def is_bare(folder: Path) -> bool:
    """Whether a folder holds a tokenizer.json and no settings beside it.

    With a model's config.json alone, transformers would take a class by the model's family, whose
    end token it adds behind the others, where the model has no row for it.
    """
    names = {file.name for file in tokenizer_files(folder)}
    return names - {"config.json", "generation_config.json"} == {"tokenizer.json"}


def model_end(folder: Path) -> int | None:
    """The token that ends a text by the generation_config.json or config.json of a folder."""
    for name in ("generation_config.json", "config.json"):
        try:
            stated = json.loads((folder / name).read_bytes()).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue  # it is not there, or damaged: who needs it says so
        first = stated[0] if isinstance(stated, list) and stated else stated
        if isinstance(first, int):
            return first
    return None


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer in a folder that are passed on."""
    files = {file for pattern in PATTERNS for file in folder.glob(pattern)}
    return sorted(file for file in files if file.is_file() and file.suffix not in _NEVER)


def copy_tokenizer(spec: str, target: Path) -> None:
    """Copies the files of `spec`, a tokenizer.json or a folder, into the new folder `target`.
    Raises UserError where there is nothing.
    """
    source = local_path(spec)
    if not source.exists():
        raise UserError(
            f"The tokenizer {spec} is not there any more: put it back, so that it can be copied."
        )
    target.mkdir(parents=True)
    if source.is_file():
        shutil.copyfile(source, target / "tokenizer.json")
        return
    for file in tokenizer_files(source):
        shutil.copyfile(file, target / file.name)


def write_byte_tokenizer(target: Path) -> None:
    """Writes the byte tokenizer into the folder `target`, in the form that transformers reads.

    Ids and texts are those of `load_tokenizer("bytes")`, with one difference: the text
    <|endoftext|> becomes the end token, as with any tokenizer of transformers.
    """
    vocabulary = {character: byte for byte, character in enumerate(_characters())}
    end = {"id": BYTES_EOS, "content": _END, "special": True}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    by_byte = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    model: dict[str, Any] = {"type": "BPE", "vocab": vocabulary, "merges": []}
    model |= dict.fromkeys(
        ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    )
    model |= dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    whole: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
    }
    whole |= {"pre_tokenizer": by_byte, "post_processor": None, "decoder": by_byte, "model": model}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _END,
        "clean_up_tokenization_spaces": False,
    }
    (target / "tokenizer.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    (target / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=1) + "\n", encoding="utf-8"
    )


def _characters() -> list[str]:
    """The character for each byte in a byte-level vocabulary (GPT-2, Radford et al., 2019).

    Printable bytes stand for themselves; the others, in order, become the characters from U+0100
    on.
    """
    printing = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return [
        chr(byte) if byte in printing else chr(0x100 + others.index(byte)) for byte in range(256)
    ]
