"""Text to token ids and back: bytes by default, or a tokenizer file that `tokenizers` or
`transformers` reads.

Nothing is ever downloaded, unpickled or run from the folder of a tokenizer: only local files in the
formats of the libraries are read, and the chat template is rendered by transformers in Jinja's
sandbox.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.errors import UserError
from moe_jax.runtime.quiet import quiet_transformers

# The vocabulary is padded to a multiple of this, so that a tensor axis of 2, 4 or 8 divides it.
VOCAB_MULTIPLE = 8

# Common end-of-document tokens in tokenizer.json files; the format has no field for it.
_END_OF_DOCUMENT = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "[EOS]",
    "<|im_end|>",
    "[SEP]",
)


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back.

    A tokenizer without an end-of-document token gets one more id for it, after its own.
    """

    num_ids: int
    """The number of ids in use: those of the tokenizer, and the end of a document."""
    eos_id: int
    """Id that ends a document."""
    fingerprint: str
    """Text that differs between tokenizers that give different ids; part of the corpus hash."""
    encode_batch: Callable[[Sequence[str]], Sequence[Sequence[int] | np.ndarray]]
    """Ids of each text, without any start or end token."""
    decode_known: Callable[[Sequence[int]], str]
    """Text of the tokenizer's own ids; `decode` takes any id."""
    bos_id: int | None = None
    """Id that starts a text, if the tokenizer has one."""
    special: Callable[[str], list[int]] | None = None
    """Ids of a text with the start and end tokens that the tokenizer adds; None if it adds none."""
    special_ids: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Ids of the tokens that `decode` leaves out, by their text."""
    chat: Callable[[list[dict[str, str]]], list[int]] | None = None
    """Ids of a conversation by the chat template, up to the start of the assistant's reply; None
    without a template.

    A message has a `role` (system, user or assistant) and its `content`. Raises UserError for
    messages that the template refuses.
    """

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: `num_ids` rounded up to a multiple of 8; the added ids occur in no
        text.
        """
        return -(-self.num_ids // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without any start or end token."""
        return [int(token) for token in self.encode_batch([text])[0]]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text for a model to continue: with the start token if the tokenizer adds one."""
        return self.special(text) if self.special else self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; end-of-document and padding ids give no text, bytes that are not UTF-8 give
        U+FFFD.
        """
        return self.decode_known(
            [int(token) for token in ids if token < self.num_ids and token != self.eos_id]
        )


def load_tokenizer(spec: str, field: str = "data.tokenizer") -> Tokenizer:
    """The tokenizer that `data.tokenizer`, or another `field` for the messages, names.

    Args:
      spec: `bytes`, or the path of a `tokenizer.json` file or of a folder saved by `transformers`.
      field: what the user gave, such as `--model`.

    Raises:
      UserError: the path does not exist, its library is not installed, or it cannot be read.
    """
    if spec == "bytes":
        return _bytes_tokenizer()
    path = Path(os.path.expanduser(spec))
    if not os.path.exists(path):  # Path.exists raises where a parent folder may not be entered
        raise UserError(
            f"{field}={spec!r} does not exist: use 'bytes', or the path of a tokenizer.json or of "
            f"its folder."
        )
    return (
        _folder_tokenizer(f"{field}={spec!r}", path)
        if path.is_dir()
        else _file_tokenizer(f"{field}={spec!r}", path)
    )


def _bytes_tokenizer() -> Tokenizer:
    """A token is a byte; 256 ends a document. 257 ids, padded to 264."""
    return Tokenizer(
        num_ids=257,
        eos_id=256,
        fingerprint="bytes",
        # A prompt may contain lone surrogates, for which UTF-8 has no bytes: they become "?".
        encode_batch=lambda texts: [
            np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8) for text in texts
        ],
        decode_known=lambda ids: bytes(ids).decode("utf-8", errors="replace"),
    )


def _file_tokenizer(given: str, path: Path) -> Tokenizer:
    """A tokenizer.json, read by `tokenizers`."""
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise UserError(
            f"{given} needs the `tokenizers` package: pip install tokenizers."
        ) from error
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises bare Exception for whatever it cannot read
        raise _unreadable(given, error) from error
    # A file may request truncation or padding, which would change the text.
    inner.no_truncation()
    inner.no_padding()
    known = [
        token
        for token in (inner.token_to_id(name) for name in _END_OF_DOCUMENT)
        if token is not None
    ]
    return Tokenizer(
        **_ids(inner.get_vocab(with_added_tokens=True), known[0] if known else None),
        fingerprint=inner.to_str(),
        encode_batch=lambda texts: [
            encoding.ids
            for encoding in inner.encode_batch_fast(
                list(map(_clean, texts)), add_special_tokens=False
            )
        ],
        decode_known=lambda ids: inner.decode(list(ids)),
    )


def _folder_tokenizer(given: str, path: Path) -> Tokenizer:
    """A folder that `transformers` saved."""
    quiet_transformers()
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise UserError(
            f"{given} is a folder, which needs the `transformers` package: pip install "
            f"transformers, "
            "or give the path of the tokenizer.json inside."
        ) from error
    try:
        inner: Any = transformers.AutoTokenizer.from_pretrained(
            str(path), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # an incomplete folder raises many kinds of errors
        raise _unreadable(given, error) from error
    vocabulary = inner.get_vocab()
    if not vocabulary:  # what transformers makes of a folder without a tokenizer's files
        raise UserError(
            f"{given} holds no tokenizer: download its tokenizer.json, or name a folder that has "
            f"one."
        )

    def encode_batch(texts: Sequence[str], special: bool = False) -> list[list[int]]:
        # verbose=False: no warning about texts longer than the model that the tokenizer was made
        # for.
        return inner(
            list(map(_clean, texts)), add_special_tokens=special, truncation=False, verbose=False
        )["input_ids"]

    return Tokenizer(
        **_ids(vocabulary, inner.eos_token_id),
        fingerprint=inner.backend_tokenizer.to_str()
        if inner.is_fast
        else json.dumps(vocabulary, sort_keys=True),
        encode_batch=encode_batch,
        decode_known=lambda ids: inner.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        ),
        bos_id=inner.bos_token_id,
        special_ids=dict(zip(inner.all_special_tokens, inner.all_special_ids, strict=True)),
        special=lambda text: encode_batch([text], special=True)[0],
        chat=functools.partial(_render_chat, given, inner) if inner.chat_template else None,
    )


def _render_chat(given: str, inner: Any, messages: list[dict[str, str]]) -> list[int]:
    """Ids of a conversation by the chat template of the folder, rendered in the sandbox of
    transformers.
    """
    try:
        import jinja2  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"{given}: its chat template needs the `jinja2` package: pip install 'jinja2>=3.1.6'."
        ) from error
    clean = [{key: _clean(value) for key, value in message.items()} for message in messages]
    try:
        ids = inner.apply_chat_template(
            clean, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except Exception as error:  # a template is a program: it may raise anything
        cause = " ".join(str(error).split())[:200]
        raise UserError(
            f"{given}: its chat template refuses these messages ({cause}): use other roles, or "
            f"correct the template."
        ) from error
    return [int(token) for token in ids]


def _ids(vocabulary: dict[str, int], eos_id: int | None) -> dict[str, Any]:
    """`num_ids` and `eos_id`; ids need not be consecutive, so the largest one counts."""
    size = max(vocabulary.values(), default=-1) + 1
    return (
        {"num_ids": size + 1, "eos_id": size}
        if eos_id is None
        else {"num_ids": size, "eos_id": eos_id}
    )


def _clean(text: str) -> str:
    """The text with "?" for lone surrogates: `tokenizers` refuses what UTF-8 cannot hold."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _unreadable(given: str, error: Exception) -> UserError:
    cause = " ".join(str(error).split())[:200]
    return UserError(
        f"{given} cannot be read as a tokenizer ({cause}): give a tokenizer.json or a folder "
        f"saved by transformers."
    )
