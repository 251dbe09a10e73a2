"""Folders with a tokenizer's files."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers, processors, trainers

SAMPLE = "the quick brown fox jumps over the lazy dog; the dog sleeps. " * 20


def save_folder(path: Path) -> Path:
    path.mkdir()
    train_tokenizer(path / "tokenizer.json", ["<end>"])
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"})
    )
    return path


def train_tokenizer(path: Path, special: list[str]) -> Path:
    """A small byte-level BPE that, left alone, would truncate, pad and put a token in front of each
    text.
    """
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=277,
        special_tokens=["<bos>", *special],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    inner.train_from_iterator([SAMPLE], trainer)
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    inner.enable_truncation(4)
    inner.enable_padding(length=8)
    inner.save(str(path))
    return path
