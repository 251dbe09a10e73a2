"""The values of a config.json, read one by one, so that what nobody read can be refused by name.

A family's mapping takes each key that it honours; `finish` then finds the keys that were neither
taken nor are known to be harmless. Nothing that could change the arithmetic is passed over in
silence.
"""

from __future__ import annotations

import difflib
from typing import Any

from moe_jax.errors import UserError

# Bookkeeping, training-only and text-generation keys: none changes what a forward pass computes.
HARMLESS = frozenset(
    [
        "_attn_implementation",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "do_sample",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "max_length",
        "min_length",
        "model_type",
        "name_or_path",
        "num_beams",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "pruned_heads",
        "repetition_penalty",
        "return_dict",
        "sep_token_id",
        "task_specific_params",
        "temperature",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "typical_p",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    ]
)
# A family that lacks what these turn on may say so.
OFF = frozenset(["attention_bias", "mlp_bias", "qkv_bias", "use_sliding_window"])
_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list",
    dict: "an object",
}


class Keys:
    """One object of a config.json; `where` starts every error, `prefix` is the object's own name in
    the file.
    """

    def __init__(self, values: dict[str, Any], where: str, prefix: str = ""):
        self.values, self.where, self.prefix = values, where, prefix
        self._taken: set[str] = set()
        self._sections: dict[str, Keys] = {}

    def get(self, key: str, kind: type, *default: Any) -> Any:
        """The value of `key`, of type `kind` (float takes whole numbers too); an absent key gives
        `default`, or is an error.

        Null is false for a bool, null where that is the default, and an error otherwise. Raises
        UserError.
        """
        self._taken.add(key)
        if key not in self.values:
            if default:
                return default[0]
            raise UserError(f"{self.where} lacks {self.prefix}{key}: it must be {_KINDS[kind]}.")
        value = self.values[key]
        if value is None and (kind is bool or default == (None,)):
            return False if kind is bool else None
        accepted: Any = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise self.refuse(key, f"must be {_KINDS[kind]}")
        return float(value) if kind is float else value

    def optional(self, key: str, kind: type, default: Any) -> Any:
        """`get` of a key whose null means something else than its absence, and is given as it
        is.
        """
        return self.get(key, kind, None) if key in self.values else self.get(key, kind, default)

    def only(self, key: str, *allowed: Any) -> None:
        """Takes a key of which we support these values alone; an absent or null one counts as the
        first.
        """
        self._taken.add(key)
        value = self.values.get(key)
        if value is not None and value not in allowed:
            choice = " or ".join(_show(one) for one in allowed)
            raise self.refuse(key, f"is not supported, only {choice}")

    def harmless(self, *keys: str) -> None:
        """Takes keys that change no arithmetic, or repeat what others say."""
        self._taken.update(keys)

    def section(self, key: str) -> Keys:
        """The object under `key`, empty if it is absent or null; its own keys are accounted for
        like these.
        """
        if key not in self._sections:
            self._sections[key] = Keys(
                self.get(key, dict, None) or {}, self.where, f"{self.prefix}{key}."
            )
        return self._sections[key]

    def refuse(self, key: str, why: str) -> UserError:
        """The error that names a key, its value and `why` it cannot be honoured."""
        return UserError(f"{self.where}: {self.prefix}{key}={_show(self.values.get(key))} {why}.")

    def finish(self) -> None:
        """Raises UserError for the keys that nobody took; null says nothing and is passed over."""
        for section in self._sections.values():
            section.finish()
        taken = self._taken | HARMLESS | {key for key in OFF if self.values.get(key) is False}
        left = [key for key, value in self.values.items() if value is not None and key not in taken]
        if left:
            near = difflib.get_close_matches(left[0], self._taken, n=1)
            hint = f" (is {self.prefix}{near[0]} meant?)" if near else ""
            raise self.refuse(
                left[0],
                f"is a setting that this family is not known to have{hint}, so it cannot be "
                f"honoured",
            )


def _show(value: Any) -> str:
    """A value as JSON spells it, cut short."""
    text = (
        {True: "true", False: "false", None: "null"}.get(value)
        if isinstance(value, bool | None)
        else None
    )
    text = text or (repr(value) if isinstance(value, str) else str(value))
    return text if len(text) <= 80 else text[:77] + "..."
