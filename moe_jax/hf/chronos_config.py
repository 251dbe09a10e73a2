"""What the config.json of a Chronos folder says, as settings of its model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_jax.errors import UserError
from moe_jax.hf.config_keys import Keys
from moe_jax.models.chronos.config import (
    BinsConfig,
    Chronos2Config,
    ChronosBoltConfig,
    ChronosConfig,
    ChronosT5Config,
    SamplingDefaults,
    StackConfig,
)
from moe_jax.utils.files import download_again

T5, BOLT, CHRONOS2 = "T5ForConditionalGeneration", "ChronosBoltModelForForecasting", "Chronos2Model"
# Of transformers' T5: they change nothing for a forecast.
_HARMLESS = (
    "classifier_dropout",
    "chronos_pipeline_class",
    "is_encoder_decoder",
    "scale_decoder_outputs",
)


def is_chronos(folder: Path | str) -> bool:
    """Whether a folder's config.json calls it a Chronos model."""
    path = Path(folder) / "config.json"
    return path.is_file() and "chronos_config" in _read(path)


def read_chronos_config(folder: Path | str) -> ChronosConfig:
    """Reads config.json alone. Raises UserError for what is missing, unknown or not supported, by
    name.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json: name a folder with a Chronos checkpoint.")
    values = _read(path)
    if "chronos_config" not in values:
        raise UserError(
            f"{path} has no chronos_config: name a folder of Chronos, Chronos-Bolt or Chronos-2."
        )
    keys = Keys(values, str(path))
    architecture = (keys.get("architectures", list, None) or [None])[0]
    readers: dict[str, Callable[[Keys, Keys], ChronosConfig]]
    readers = {T5: _t5, BOLT: _bolt, CHRONOS2: _chronos2}
    if architecture not in readers:
        raise keys.refuse("architectures", f"is not supported, only one of {', '.join(readers)}")
    keys.harmless(*_HARMLESS)
    keys.only("dense_act_fn", "relu")
    keys.only("feed_forward_proj", "relu")
    keys.only("is_gated_act", False)
    keys.only("tie_word_embeddings", True)
    config = readers[architecture](keys, keys.section("chronos_config"))
    keys.finish()
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): {download_again(path)}.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold an object: {download_again(path)}.")
    return values


def _stack(keys: Keys, decoder: bool) -> StackConfig:
    layers = keys.get("num_layers", int)
    return StackConfig(
        width=keys.get("d_model", int),
        num_heads=keys.get("num_heads", int),
        head_width=keys.get("d_kv", int),
        hidden=keys.get("d_ff", int),
        num_layers=layers,
        # as in T5, a decoder is as deep as its encoder unless the config says otherwise
        num_decoder_layers=(keys.get("num_decoder_layers", int, None) or layers) if decoder else 0,
        norm_eps=keys.get("layer_norm_epsilon", float, 1e-6),
        buckets=keys.get("relative_attention_num_buckets", int, 32) if decoder else 32,
        max_distance=keys.get("relative_attention_max_distance", int, 128) if decoder else 128,
        init_factor=keys.get("initializer_factor", float, 0.05),
    )


def _t5(keys: Keys, chronos: Keys) -> ChronosT5Config:
    chronos.only("model_type", "seq2seq")
    chronos.only("tokenizer_class", "MeanScaleUniformBins")
    limits = chronos.section("tokenizer_kwargs")
    bins = BinsConfig(
        low=limits.get("low_limit", float),
        high=limits.get("high_limit", float),
        num_tokens=chronos.get("n_tokens", int),
        num_special=chronos.get("n_special_tokens", int),
        pad=chronos.get("pad_token_id", int),
        eos=chronos.get("eos_token_id", int),
        use_eos=chronos.get("use_eos_token", bool),
    )
    if keys.get("vocab_size", int) != bins.num_tokens:
        raise keys.refuse("vocab_size", f"is not chronos_config.n_tokens={bins.num_tokens}")
    return ChronosT5Config(
        _stack(keys, decoder=True),
        bins,
        SamplingDefaults(
            chronos.get("num_samples", int),
            chronos.get("temperature", float),
            chronos.get("top_k", int),
            chronos.get("top_p", float),
        ),
        context_length=chronos.get("context_length", int),
        prediction_length=chronos.get("prediction_length", int),
        start=keys.get("decoder_start_token_id", int, 0) or 0,
    )


def _quantiles(chronos: Keys) -> tuple[float, ...]:
    levels = chronos.get("quantiles", list)
    if not levels or sorted(set(levels)) != levels or not 0 < levels[0] <= levels[-1] < 1:
        raise chronos.refuse("quantiles", "must be levels between 0 and 1 in ascending order")
    if 0.5 not in levels:
        raise chronos.refuse("quantiles", "lacks 0.5, the median")
    return tuple(map(float, levels))


def _patch(chronos: Keys) -> int:
    patch = chronos.get("input_patch_size", int)
    chronos.only("input_patch_stride", patch)
    return patch


def _bolt(keys: Keys, chronos: Keys) -> ChronosBoltConfig:
    keys.harmless("vocab_size")  # the library counts its tokens itself
    return ChronosBoltConfig(
        _stack(keys, decoder=True),
        context_length=chronos.get("context_length", int),
        prediction_length=chronos.get("prediction_length", int),
        patch=_patch(chronos),
        quantiles=_quantiles(chronos),
        use_reg_token=chronos.get("use_reg_token", bool, False),
        start=keys.get("decoder_start_token_id", int, 0) or 0,
    )


def _chronos2(keys: Keys, chronos: Keys) -> Chronos2Config:
    keys.harmless("vocab_size", "num_decoder_layers")
    keys.harmless("relative_attention_num_buckets", "relative_attention_max_distance")
    patch, context = _patch(chronos), chronos.get("context_length", int)
    chronos.only("output_patch_size", patch)
    return Chronos2Config(
        _stack(keys, decoder=False),
        context_length=context,
        patch=patch,
        max_output_patches=chronos.get("max_output_patches", int),
        quantiles=_quantiles(chronos),
        use_reg_token=chronos.get("use_reg_token", bool, False),
        use_arcsinh=chronos.get("use_arcsinh", bool, False),
        time_scale=chronos.get("time_encoding_scale", int, None) or context,
        rope_theta=keys.get("rope_theta", float, 10_000.0),
    )
