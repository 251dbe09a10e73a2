"""Text to token ids and back: bytes by default, or a tokenizer file that `tokenizers` or
`transformers` reads.

Nothing is ever downloaded, unpickled or run from the folder of a tokenizer: only local files in the
formats of the libraries are read, and the chat template is rendered by transformers in Jinja's
sandbox.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.data.chat_template import ChatTemplate, load_template, without_surrogates
from moe_jax.data.tokenizer_files import BYTES_EOS, is_bare, model_end
from moe_jax.errors import UserError
from moe_jax.runtime.quiet import quiet_transformers
from moe_jax.utils.files import download_again, local_path

# The vocabulary is padded to a multiple of this, so that a tensor axis of 2, 4 or 8 divides it.
VOCAB_MULTIPLE = 8

# Common end-of-document tokens in tokenizer.json files; the format has no field for it. The bars of
# DeepSeek's are U+FF5C, its low lines U+2581.
_END_OF_DOCUMENT = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "[EOS]",
    "<|im_end|>",
    "[SEP]",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<seed:eos>",
    "<EOS_TOKEN>",
)


# A text to see by what a tokenizer puts around one.
_PROBE = "a"


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
    start_ids: tuple[int, ...] = ()
    """Ids that the tokenizer puts in front of a text. What it appends is not kept: a prompt goes
    on, and nobody goes on from an end token.
    """
    special_ids: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Ids of the tokens that `decode` leaves out, by their text."""
    chat: ChatTemplate | None = None
    """How a conversation is written; None without a template."""

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of the fingerprint, which may be megabytes."""
        return hashlib.sha256(self.fingerprint.encode()).hexdigest()

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end what a model says: that of a document, and what the chat template ends a
        turn with.
        """
        turn = None if self.chat is None else self.chat.end_id
        return (self.eos_id,) if turn is None or turn == self.eos_id else (self.eos_id, turn)

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
        """Ids of a text for a model to continue: after the start token if the tokenizer adds
        one.
        """
        return [*self.start_ids, *self.encode(text)]

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
      field: what names it in messages.

    Raises:
      UserError: the path does not exist, its library is not installed, or it cannot be read.
    """
    if spec == "bytes":
        return _bytes_tokenizer()
    path = local_path(spec)
    if not os.path.exists(path):  # Path.exists raises where a parent folder may not be entered
        raise UserError(
            f"{field}={spec!r} does not exist: use 'bytes', or the path of a tokenizer.json or of "
            f"its folder."
        )
    given = f"{field}={spec!r}"
    if not path.is_dir():
        return _file_tokenizer(given, path)
    # A run keeps a tokenizer.json in a folder of its own, where it must be what it was before.
    return (
        _file_tokenizer(given, path / "tokenizer.json", model_end(path))
        if is_bare(path)
        else _folder_tokenizer(given, path)
    )


def _bytes_tokenizer() -> Tokenizer:
    """A token is a byte; 256 ends a document. 257 ids, padded to 264."""
    return Tokenizer(
        num_ids=BYTES_EOS + 1,
        eos_id=BYTES_EOS,
        fingerprint="bytes",
        # A prompt may contain lone surrogates, for which UTF-8 has no bytes: they become "?".
        encode_batch=lambda texts: [
            np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8) for text in texts
        ],
        decode_known=lambda ids: bytes(ids).decode("utf-8", errors="replace"),
    )


def _file_tokenizer(given: str, path: Path, end: int | None = None) -> Tokenizer:
    """A tokenizer.json, read by `tokenizers`; `end` is the model's end token, if it is known."""
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise UserError(
            f"{given} needs the `tokenizers` package: pip install tokenizers."
        ) from error
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises bare Exception for whatever it cannot read
        raise _unreadable(given, path, error) from error
    # A file may request truncation or padding, which would change the text.
    inner.no_truncation()
    inner.no_padding()
    added = inner.get_added_tokens_decoder()
    return Tokenizer(
        **_ids(inner.get_vocab(with_added_tokens=True), None, end),
        fingerprint=inner.to_str(),
        encode_batch=lambda texts: [
            encoding.ids
            for encoding in inner.encode_batch_fast(
                list(map(without_surrogates, texts)), add_special_tokens=False
            )
        ],
        decode_known=lambda ids: inner.decode(list(ids)),
        start_ids=_before_text(
            inner.encode(_PROBE).ids, inner.encode(_PROBE, add_special_tokens=False).ids
        ),
        special_ids={token.content: number for number, token in added.items() if token.special},
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
        raise _unreadable(given, path, error) from error
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
            list(map(without_surrogates, texts)),
            add_special_tokens=special,
            truncation=False,
            verbose=False,
        )["input_ids"]

    special_ids = dict(zip(inner.all_special_tokens, inner.all_special_ids, strict=True))
    special_ids |= {
        token.content: number
        for number, token in inner.added_tokens_decoder.items()
        if token.special
    }
    return Tokenizer(
        **_ids(vocabulary, inner.eos_token_id, model_end(path)),
        fingerprint=inner.backend_tokenizer.to_str()
        if inner.is_fast
        else json.dumps(vocabulary, sort_keys=True),
        encode_batch=encode_batch,
        decode_known=lambda ids: inner.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        ),
        bos_id=inner.bos_token_id,
        start_ids=_before_text(*(encode_batch([_PROBE], special)[0] for special in (True, False))),
        special_ids=special_ids,
        chat=load_template(given, inner) if inner.chat_template else None,
    )


def _before_text(whole: Sequence[int], text: Sequence[int]) -> tuple[int, ...]:
    """The ids that a tokenizer put in front of a text: `whole` has them, the text's own ids and
    what it appended.
    """
    for start in range(len(whole) - len(text) + 1):
        if list(whole[start : start + len(text)]) == list(text):
            return tuple(whole[:start])
    return ()


def _ids(vocabulary: dict[str, int], eos_id: int | None, end: int | None) -> dict[str, Any]:
    """`num_ids` and `eos_id`: the tokenizer's own, one with a common name, the model's `end`, or an
    id more. Ids need not be consecutive, so the largest one counts.
    """
    size = max(vocabulary.values(), default=-1) + 1
    known = [vocabulary[name] for name in _END_OF_DOCUMENT if name in vocabulary]
    known += [] if end is None or end >= size else [end]
    if eos_id is None and known:
        eos_id = known[0]
    return (
        {"num_ids": size + 1, "eos_id": size}
        if eos_id is None
        else {"num_ids": size, "eos_id": eos_id}
    )


def _unreadable(given: str, path: Path, error: Exception) -> UserError:
    file = path / "tokenizer.json" if path.is_dir() else path
    remedy = download_again(file) if file.is_file() else ""
    if "Git LFS" in remedy:
        return UserError(f"{given} cannot be read as a tokenizer: {file.name}: {remedy}.")
    cause = " ".join(str(error).split())[:200]
    return UserError(
        f"{given} cannot be read as a tokenizer ({cause}): give a tokenizer.json or a folder "
        f"saved by transformers."
    )
