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


def chat_folder(
    path: Path, template: str, special: list[str], post: str | None = None, **settings: object
) -> Path:
    """A folder whose tokenizer has a chat template and these special tokens, which
    tokenizer_config.json does not list. `post` is what it puts around a text.
    """
    path.mkdir()
    train_tokenizer(path / "tokenizer.json", special)
    inner = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    inner.no_padding()
    if post is not None:
        around = [(name, inner.token_to_id(name)) for name in post.split() if name != "$A"]
        inner.post_processor = processors.TemplateProcessing(single=post, special_tokens=around)
    inner.save(str(path / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, **settings}
    (path / "tokenizer_config.json").write_text(json.dumps(content))
    return path


# Templates of well-known models, without tools and dates.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# Qwen3: what was thought is written for the last turn alone.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "{% if loop.last %}<think>\n"
    "{{ parts[0].split('<think>')[-1].strip('\\n') if parts|length > 1 else '' }}"
    "\n</think>\n\n{% endif %}{{ parts[-1].lstrip('\\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<bos>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
HARMONY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# Without tokens of its own.
SPOKEN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
GLM = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]
HARMONY_TOKENS = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"]
