"""What a model is made of: the `model` and `moe` sections of the configuration tree (see
schema.py).

Only the standard library is needed here. A layer sees the section it needs and nothing else.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from moe_jax.config.fields import section, setting
from moe_jax.errors import UserError


@section
class RopeConfig:
    """Rotary position embedding (Su et al., 2021) and its length extensions."""

    SECTION = "model.rope."

    theta: float = setting(default=10_000.0, help="Base of the rotary frequencies.", gt=0)
    scaling: Literal["none", "linear", "dynamic", "llama3", "yarn"] = setting(
        default="none", help="How frequencies are rescaled beyond `original_length`."
    )
    factor: float = setting(
        default=1.0, help="How many times longer than `original_length` the context may be.", ge=1
    )
    original_length: int = setting(
        default=4096, help="Context length, in tokens, that the frequencies were made for.", ge=1
    )
    low_freq_factor: float = setting(
        default=1.0,
        help="llama3: frequencies of wavelengths above original_length/this are divided by "
        "`factor`.",
        gt=0,
    )
    high_freq_factor: float = setting(
        default=4.0,
        help="llama3: frequencies of wavelengths below original_length/this stay unchanged.",
        gt=0,
    )
    beta_fast: float = setting(
        default=32.0,
        help="yarn: frequencies with more rotations over original_length than this stay unchanged.",
        gt=0,
    )
    beta_slow: float = setting(
        default=1.0,
        help="yarn: frequencies with fewer rotations over original_length than this are divided by "
        "`factor`.",
        gt=0,
    )
    truncate: bool = setting(
        default=True,
        help="yarn: widen the range between the two to whole dimensions.",
    )
    attention_factor: float | None = setting(
        default=None, help="yarn: factor on sines and cosines; null is 0.1 ln(factor) + 1.", gt=0
    )
    fraction: float = setting(
        default=1.0, help="Fraction of a head's width that is rotated, from its start.", gt=0, le=1
    )

    def check(self) -> None:
        if self.scaling == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                f"model.rope.high_freq_factor={self.high_freq_factor:g} must exceed "
                f"low_freq_factor={self.low_freq_factor:g}: raise it."
            )


@section
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, 2024): keys and values are projections of one
    narrow vector per token.
    """

    SECTION = "model.latent."

    kv_rank: int = setting(
        default=0,
        help="Width of the vector that keys and values are made from; 0 is ordinary attention.",
        ge=0,
    )
    q_rank: int | None = setting(
        default=None,
        help="Width of the vector that queries are made from; null makes them from the input.",
        ge=1,
    )
    rope_width: int = setting(
        default=64,
        help="Width of a head's rotated part, beside `head_dim`; all heads share one rotated key.",
        ge=2,
    )
    value_width: int = setting(default=128, help="Width of a head's value.", ge=1)

    def check(self) -> None:
        if self.rope_width % 2:
            raise UserError(
                f"model.latent.rope_width={self.rope_width} is odd and cannot be rotated: choose "
                f"an even width."
            )


@section
class ForecastConfig:
    """A forecaster of time series in place of a language model: an encoder-decoder of
    Chronos-Bolt's form (Ansari et al., 2024), whose decoder's feed-forward parts may be experts
    ([forecasting.md](forecasting.md)).

    Of the other keys of `model` it takes `num_layers` (the encoder's), `width`, `num_heads`,
    `head_dim`, `hidden`, `norm_eps`, `compute_dtype` and `remat`. Keys of `moe` that count layers
    count the decoder's.
    """

    SECTION = "model.forecast."

    patch: int = setting(
        default=0, help="Values per patch; 0 is a language model and no forecaster.", ge=0
    )
    decoder_layers: int = setting(default=2, help="Layers of the decoder.", ge=1)
    context_length: int = setting(default=512, help="Values of a series that are read.", ge=1)
    prediction_length: int = setting(default=64, help="Steps that one pass forecasts.", ge=1)
    quantiles: tuple[float, ...] = setting(
        default=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        help="Levels that are forecast, ascending; 0.5, the median, is one of them.",
    )

    @property
    def patches(self) -> int:
        """Tokens of the encoder: the patches of a whole context, and REG."""
        return -(-self.context_length // self.patch) + 1

    def check(self) -> None:
        levels = self.quantiles
        if 0.5 not in levels or levels != tuple(sorted({*levels})) or not levels[0] > 0:
            raise UserError(
                f"model.forecast.quantiles={list(levels)} must be ascending levels between 0 and 1 "
                f"with 0.5 among them."
            )
        if levels[-1] >= 1:
            raise UserError(f"model.forecast.quantiles: {levels[-1]} is no level: stay below 1.")


# What a forecaster takes of the keys of `model`; the tokenizer's vocabulary may be among them.
_OF_FORECASTERS = frozenset(
    (
        *("num_layers", "width", "num_heads", "head_dim", "hidden", "norm_eps"),
        *("compute_dtype", "remat", "forecast", "vocab_size"),
    )
)


@section
class ModelConfig:
    """The decoder-only transformer around the experts, or a forecaster."""

    SECTION = "model."

    vocab_size: int | None = setting(
        default=None, help="Vocabulary (V); null takes the tokenizer's.", ge=2
    )
    num_layers: int = setting(default=4, help="Transformer layers (L).", ge=1)
    width: int = setting(default=128, help="Model width (D).", ge=1)
    num_heads: int = setting(default=4, help="Query heads (H).", ge=1)
    num_kv_heads: int = setting(
        default=2, help="Key and value heads (G); it divides num_heads.", ge=1
    )
    head_dim: int | None = setting(
        default=None, help="Head width (Q); null is width/num_heads.", ge=2
    )
    hidden: int = setting(
        default=512, help="Hidden width of the feed-forward part in dense layers.", ge=1
    )
    qk_norm: bool = setting(
        default=True, help="RMS-normalise each query and key head before the rotation."
    )
    qk_norm_over: Literal["head", "width"] = setting(
        default="head",
        help="qk_norm: normalise each head by itself, or all of them as one vector (OLMoE).",
    )
    qkv_bias: bool = setting(default=False, help="Biases on the query, key and value projections.")
    out_bias: bool = setting(default=False, help="A bias on attention's output projection.")
    mlp_bias: bool = setting(default=False, help="Biases in the feed-forward part of dense layers.")
    sinks: bool = setting(
        default=False,
        help="One learned attention-sink logit per head (gpt-oss).",
    )
    clip_qkv: float | None = setting(
        default=None,
        help="Clamp queries, keys and values to +- this before the rotation; null does not.",
        gt=0,
    )
    attention_scale: float | None = setting(
        default=None, help="Factor on attention scores; null is 1/sqrt(head width).", gt=0
    )
    latent: LatentConfig = setting(default=LatentConfig(), help="Multi-head latent attention.")
    sliding_window: int | None = setting(
        default=None,
        help="Tokens that a position attends to at most, itself included; null sets no limit.",
        ge=1,
    )
    window_every: int = setting(
        default=1,
        help="With sliding_window: every n-th layer keeps full attention; 1 gives all layers the "
        "window.",
        ge=1,
    )
    full_layers: tuple[int, ...] = setting(
        default=(), help="Indices of more layers that keep full attention."
    )
    tied_embeddings: bool = setting(
        default=True, help="The output head is the transposed embedding."
    )
    norm_eps: float = setting(default=1e-6, help="Epsilon of the RMS norms.", gt=0)
    compute_dtype: Literal["float32", "bfloat16"] = setting(
        default="float32",
        help="Type of activations and of weights in matmuls; master weights are f32.",
    )
    remat: Literal["none", "dots", "full"] = setting(
        default="none",
        help="What the backward pass recomputes: none; dots: all but matmuls; full: whole layers.",
    )
    attention: Literal["auto", "reference", "blockwise", "cudnn", "splash"] = setting(
        default="auto", help="Attention back end; auto chooses by platform."
    )
    rope: RopeConfig = setting(default=RopeConfig(), help="Rotary position embedding.")
    forecast: ForecastConfig = setting(
        default=ForecastConfig(), help="A forecaster of series in place of a language model."
    )

    @property
    def head_width(self) -> int:
        """Head width Q."""
        return self.head_dim or self.width // self.num_heads

    @property
    def query_width(self) -> int:
        """Width of a query head, its rotated part included."""
        return self.head_width + (self.latent.rope_width if self.latent.kv_rank else 0)

    @property
    def value_width(self) -> int:
        """Width of a head's value."""
        return self.latent.value_width if self.latent.kv_rank else self.head_width

    @property
    def forecasts(self) -> bool:
        """Whether it is a forecaster of series and no language model."""
        return self.forecast.patch > 0

    def check(self) -> None:
        if self.forecasts:
            self._check_forecaster()
        elif self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_kv_heads={self.num_kv_heads} does not divide "
                f"model.num_heads={self.num_heads}: choose a divisor."
            )
        if self.head_dim is None and self.width % self.num_heads:
            raise UserError(
                f"model.num_heads={self.num_heads} does not divide model.width={self.width}: "
                f"change one, or set model.head_dim."
            )
        if self.attention == "cudnn" and (self.sinks or self.latent.kv_rank):
            what = (
                "model.sinks=true" if self.sinks else f"model.latent.kv_rank={self.latent.kv_rank}"
            )
            raise UserError(
                f"model.attention=cudnn does not go with {what}: use auto or blockwise."
            )
        if self.latent.kv_rank:
            self._check_latent()
        elif not self.forecasts and round(self.head_width * self.rope.fraction) % 2:
            raise UserError(
                f"model.rope.fraction={self.rope.fraction:g} of model.head_dim={self.head_width} "
                f"is odd and cannot be rotated: choose an even width."
            )

    def _check_forecaster(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in _OF_FORECASTERS and value != field.default:
                raise UserError(
                    f"model.{field.name}={value!r} does not go with "
                    f"model.forecast.patch={self.forecast.patch}, a forecaster: leave it out."
                )

    def _check_latent(self) -> None:
        if round(self.latent.rope_width * self.rope.fraction) % 2:
            raise UserError(
                f"model.rope.fraction={self.rope.fraction:g} of "
                f"model.latent.rope_width={self.latent.rope_width} is odd and cannot be rotated: "
                "choose an even width."
            )
        if self.num_kv_heads != self.num_heads:
            raise UserError(
                f"model.num_kv_heads={self.num_kv_heads} must equal "
                f"model.num_heads={self.num_heads} with model.latent.kv_rank set."
            )
        for key, wanted in (("qk_norm", False), ("sinks", False), ("clip_qkv", None)):
            if getattr(self, key) != wanted:
                raise UserError(
                    f"model.{key} does not go with model.latent.kv_rank={self.latent.kv_rank}: "
                    f"leave one of them out."
                )


@section
class MoEConfig:
    """Router, experts, and how tokens are sent to them. A MoE layer sees only this section."""

    SECTION = "moe."

    num_experts: int = setting(default=8, help="Experts per layer (E).", ge=1)
    top_k: int = setting(default=2, help="Experts per token (K).", ge=1)
    hidden: int = setting(default=128, help="Hidden width of an expert (F).", ge=1)
    capacity_factor: float = setting(
        default=1.25,
        help="Capacity of each pool of rows from one device to another, relative to an even share; "
        "rows beyond it are dropped, or wait a round (dropless).",
        gt=0,
    )
    dropless: bool | None = setting(
        default=None,
        help="Drop no token: rows beyond the capacity go in further rounds. null is what the model "
        "of `init_from` has (true for a Hugging Face folder), else false.",
    )
    first_dense: int = setting(default=0, help="Leading layers that are dense.", ge=0)
    every: int = setting(
        default=1, help="Every n-th of the other layers has experts; 1 is all of them.", ge=1
    )
    dense_layers: tuple[int, ...] = setting(
        default=(), help="Indices of more layers that are dense."
    )
    score: Literal["softmax", "sigmoid"] = setting(
        default="softmax",
        help="Scores from logits: softmax over all experts, or a sigmoid of each.",
    )
    normalize: Literal["before", "after"] = setting(
        default="after",
        help="after: rescale the chosen experts' scores to sum to 1. before: use the scores "
        "unchanged.",
    )
    routed_scale: float = setting(default=1.0, help="Factor on the routed experts' weights.", gt=0)
    route_by: Literal["token", "sequence"] = setting(
        default="token",
        help="token: each token chooses its experts. sequence: one route per sequence, from the "
        "mean of its tokens, which all its tokens take; load and losses then count sequences. A "
        "language model of this kind can be trained and validated and cannot generate, as its "
        "route depends on tokens that are still to come.",
    )
    num_groups: int = setting(
        default=1, help="Groups of experts for group-limited selection (DeepSeek); 1 is none.", ge=1
    )
    top_groups: int = setting(default=1, help="Groups that a token may choose from.", ge=1)
    shared_experts: int = setting(
        default=0,
        help="Experts that every token passes through, fused into one of this many times `hidden`.",
        ge=0,
    )
    shared_hidden: int | None = setting(
        default=None,
        help="Hidden width of the shared experts together; null is shared_experts x hidden.",
        ge=1,
    )
    shared_gate: bool = setting(
        default=False, help="Scale the shared experts' output by a sigmoid gate of the token."
    )
    router_bias: bool = setting(default=False, help="A learned bias on the router's logits.")
    expert_bias: bool = setting(default=False, help="Biases in the experts.")
    swiglu_limit: float | None = setting(
        default=None,
        help="Experts compute clamp(gate) sigmoid(1.702 clamp(gate)) (clamp(up) + 1), clamped at "
        "this value (gpt-oss); null is SwiGLU.",
        gt=0,
    )
    temperature: float = setting(default=1.0, help="Divides the router's logits.", gt=0)
    input_noise: float = setting(
        default=0.0,
        help="Training: multiply the router's input by uniform noise in 1 +- this.",
        ge=0,
        le=1,
    )
    expert_dropout: float = setting(
        default=0.0,
        help="Training: probability that a sequence cannot choose an expert.",
        ge=0,
        le=0.9,
    )
    bias_rate: float = setting(
        default=0.0,
        help="Step of the balance bias, updated without a loss (DeepSeek-V3); 0 is off.",
        ge=0,
    )
    z_loss: float = setting(default=0.001, help="Coefficient of the router z-loss.", ge=0)
    aux_loss: float = setting(
        default=0.01,
        help="Coefficient of the Switch load-balancing loss over the whole batch.",
        ge=0,
    )
    aux_over: Literal["layer", "model"] = setting(
        default="layer",
        help="aux_loss: layer: one loss per layer, summed. model: one loss of loads and scores "
        "averaged over the layers (as transformers does).",
    )
    sequence_aux_loss: float = setting(
        default=0.0, help="Coefficient of the same loss over each sequence alone.", ge=0
    )
    variance_loss: float = setting(
        default=0.0,
        help="Coefficient of the variance of the experts' usage (mean score times E).",
        ge=0,
    )
    dispatch: Literal["auto", "pooled", "gather"] = setting(
        default="auto",
        help="pooled: all_to_all of pools. gather: all_gather of all tokens. auto: gather for few "
        "tokens.",
    )
    gather_below: int = setting(
        default=8, help="dispatch=auto gathers when a device has fewer tokens than this.", ge=0
    )
    overlap_chunks: int | None = setting(
        default=None,
        help="Chunks of exchanged rows: one travels while the experts compute another. null: by "
        "their bytes where the platform can do both at once, else 1.",
        ge=1,
    )
    grouped_matmul: Literal["auto", "reference", "ragged", "tiled"] = setting(
        default="auto", help="Grouped matmul back end; auto chooses by platform."
    )

    @property
    def weight_is_constant(self) -> bool:
        """Whether each token's one weight is rescaled to 1, so that what the experts give teaches
        the router nothing.
        """
        return self.top_k == 1 < self.num_experts and self.normalize == "after"

    @property
    def shared_width(self) -> int:
        """Hidden width of all shared experts together; 0 for none."""
        return (
            (self.shared_hidden or self.shared_experts * self.hidden) if self.shared_experts else 0
        )

    def check(self) -> None:
        if self.top_k > self.num_experts:
            raise UserError(
                f"moe.top_k={self.top_k} exceeds moe.num_experts={self.num_experts}: lower top_k "
                f"or add experts."
            )
        if self.num_experts % self.num_groups:
            raise UserError(
                f"moe.num_groups={self.num_groups} does not divide "
                f"moe.num_experts={self.num_experts}: choose a divisor."
            )
        if self.top_groups > self.num_groups:
            raise UserError(
                f"moe.top_groups={self.top_groups} exceeds moe.num_groups={self.num_groups}: "
                f"lower it."
            )
        if self.top_k > self.top_groups * (self.num_experts // self.num_groups):
            raise UserError(
                f"moe.top_groups={self.top_groups} leaves fewer experts than "
                f"moe.top_k={self.top_k}: raise top_groups."
            )
        if self.num_groups > 1 and self.num_experts // self.num_groups < 2:
            raise UserError(
                f"moe.num_groups={self.num_groups} leaves one expert per group: use fewer groups."
            )
        if self.shared_gate and not self.shared_experts:
            raise UserError("moe.shared_gate=true needs a shared expert: set moe.shared_experts.")
