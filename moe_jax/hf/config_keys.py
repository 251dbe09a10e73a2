"""The values of a config.json, read one by one, so that what nobody read can be judged by its name
and value.

A family's mapping takes each key that it honours. Of the others, `finish` passes over what changes
no arithmetic: the bookkeeping of transformers and other tools, and keys whose value turns off what
they are about. It refuses the rest by name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from moe_jax.errors import UserError

# Names that concern files, training, a call or the generation of text, whatever their value:
# transformers, too, computes the same with and without them.
_HARMLESS = re.compile(
    r"""
    _.*               # what transformers keeps for itself
    | .*\..*          # another tool's, such as transformers.js_config
    | .*_token_(id|ids|index)
    | ((model_)?max|min|(max_)?seq(uence)?)_len(gth)? | n_ctx | n_positions

    | architectures | auto_map | chunk_size_feed_forward | (attn|experts)_implementation
    | (torch_)?dtype | use_bfloat16 | torchscript | is_decoder | is_llama_config | model_type
    | name_or_path | tokenizer_class | (transformers|unsloth)_.* | .*_version | use_cache
    | output_(attentions|hidden_states|logits|router_logits|scores) | (use_)?return_dict.*

    | .*drop(out|path)?(_prob|_rate)? | .*_pdrop | initializer_.* | gradient_checkpointing
    | finetuning_task | task_specific_params | problem_type | num_labels | id2label | label2id
    | pretraining_tp

    | do_sample | temperature | top_[hkp] | min_p | typical_p | .*_penalty | penalty_alpha
    | (epsilon|eta)_cutoff | early_stopping | num_(beams|beam_groups|return_sequences)
    | (encoder_)?no_repeat_ngram_size | guidance_scale | max_time | (max|min)_new_tokens
    | bad_words_ids | force_words_ids | (begin_)?suppress_tokens | stop_strings | sequence_bias
    | remove_invalid_values | renormalize_logits | watermarking_config | use_mtp
    | cache_(config|implementation) | max_cache_len | .*_lookbehind | prompt_lookup_num_tokens
    | assistant_confidence_threshold | num_assistant_tokens(_schedule)?
    """,
    re.VERBOSE,
)
# Known features that a family may say it lacks, in no need of a remark.
_OFF = (
    "add_cross_attention",
    "attention_bias",
    "is_encoder_decoder",
    "mlp_bias",
    "pruned_heads",
    "qkv_bias",
    "rope_interleaved",
    "tie_encoder_decoder",
    "use_mrope",
    "use_sliding_window",
)
# A factor does nothing at 1, and much at 0.
_FACTOR = re.compile(r"(^|_)(factor|multiplier|ratio|scale|scaling)(_|$)")
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

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Takes keys that name a property of the model in words that its family does not use, where
        they say what is so. Raises UserError for one that contradicts.
        """
        for key in facts.keys() & self.values.keys() - self._taken:
            value = self.values[key]
            if value == facts[key]:
                self._taken.add(key)
            elif value is not None and not (key in _OFF and is_off(key, value)):
                raise self.refuse(
                    key, f"contradicts the model_type, of which {_show(facts[key])} is true"
                )

    def finish(self) -> list[str]:
        """The keys that nobody took or knows, but whose value is the one that means "off". Raises
        UserError for those with another value; null says nothing.
        """
        passed = [name for section in self._sections.values() for name in section.finish()]
        for key, value in self.values.items():
            if value is None or key in self._taken or _HARMLESS.fullmatch(key):
                continue
            if not is_off(key, value):
                near = difflib.get_close_matches(key, self._taken, n=1)
                hint = f" (is {self.prefix}{near[0]} meant?)" if near else ""
                raise self.refuse(
                    key,
                    f"is a setting that this family is not known to have{hint}, so it cannot be "
                    f"honoured",
                )
            if key not in _OFF:
                passed.append(f"{self.prefix}{key}")
        return passed


def is_off(key: str, value: Any) -> bool:
    """Whether a value means that what the key names is not used: null, false, 0, nothing in a list
    or text, and 1 for a factor.
    """
    if isinstance(value, dict):
        return all(is_off(inner, content) for inner, content in value.items())
    if isinstance(value, str):
        return value.lower() in ("", "none")
    if isinstance(value, int | float) and not isinstance(value, bool) and _FACTOR.search(key):
        return value == 1
    return not value


def _show(value: Any) -> str:
    """A value as JSON spells it, cut short."""
    text = (
        {True: "true", False: "false", None: "null"}.get(value)
        if isinstance(value, bool | None)
        else None
    )
    text = text or (repr(value) if isinstance(value, str) else str(value))
    return text if len(text) <= 80 else text[:77] + "..."
