"""What people pass to the Python API, checked before anything is computed: each mistake is one
sentence that names the argument.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.config.schema import MeshConfig
from moe_jax.errors import UserError
from moe_jax.model_io.source import DTYPES, INT4_GROUP, QUANTIZED

_ONE_OR_MORE = "a whole number of 1 or more"


def check_load(path: Any, **options: Any) -> None:
    """Raises UserError for what `moe_jax.load` cannot take; `options` are its own by name."""
    _require("path", path, isinstance(path, str | os.PathLike), "the path or name of a model")
    mesh, quantize, group = (options[name] for name in ("mesh", "quantize", "group"))
    wanted = "a moe_jax.MeshConfig, such as moe_jax.MeshConfig(expert=2)"
    _require("mesh", mesh, mesh is None or isinstance(mesh, MeshConfig), wanted)
    for name, allowed in (("dtype", DTYPES), ("quantize", QUANTIZED)):
        value = options[name]
        _require(name, value, value is None or value in allowed, " or ".join(map(repr, allowed)))
    even = _is_count(group) and group % 2 == 0
    _require("group", group, even, "an even number, such as 32 or 64")
    if group != INT4_GROUP and quantize != "int4":
        raise UserError(f"group={group} is for quantize='int4': give that too, or leave it out.")
    for name in ("memory", "context", "expert_cache"):
        value = options[name]
        _require(name, value, value is None or _is_count(value), _ONE_OR_MORE)
    step = options["step"]
    _require("step", step, step is None or _is_count(step, 0), "a whole number of 0 or more")


def token_ids(name: str, tokens: Any) -> list[int]:
    """Token ids as ints. Raises UserError for anything else."""
    try:
        ids = [operator.index(token) for token in tokens]
    except TypeError:
        ids = [-1]
    if any(token < 0 for token in ids):
        _require(name, tokens, False, "a text, or token ids, which are whole numbers from 0")
    return ids


def check_text(name: str, value: Any) -> None:
    """Raises UserError where a value is no text."""
    _require(name, value, isinstance(value, str), "a text")


def check_messages(messages: Any) -> None:
    """Raises UserError where this is no conversation."""
    fine = isinstance(messages, Sequence) and all(isinstance(one, Mapping) for one in messages)
    if not fine or not messages or not all(isinstance(one.get("role"), str) for one in messages):
        raise UserError(
            "messages: give a list of messages such as "
            "[{'role': 'user', 'content': 'Hello'}], with at least one."
        )


def check_max_tokens(value: Any) -> None:
    """Raises UserError where it is no number of tokens."""
    _require("max_tokens", value, _is_count(value), _ONE_OR_MORE)


def stop_strings(stop: Any) -> tuple[str, ...]:
    """Strings to stop at; one string is one. Raises UserError for what is no text."""
    strings = (stop,) if isinstance(stop, str) else stop
    fine = isinstance(strings, Sequence) and all(isinstance(one, str) and one for one in strings)
    _require("stop", stop, fine, "a text or a list of texts, none of them empty")
    return tuple(strings)


def _is_count(value: Any, least: int = 1) -> bool:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return whole and bool(value >= least)


def _require(name: str, value: Any, fine: bool, wanted: str) -> None:
    if not fine:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise UserError(f"{name}={shown}: give {wanted}.")
