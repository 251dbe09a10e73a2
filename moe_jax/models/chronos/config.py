"""What makes up a Chronos model."""

from __future__ import annotations

from typing import NamedTuple

from moe_jax.config.model import ModelConfig


class StackConfig(NamedTuple):
    """The widths that a model's layers share."""

    width: int
    num_heads: int
    head_width: int
    hidden: int
    num_layers: int
    num_decoder_layers: int = 0
    norm_eps: float = 1e-6
    buckets: int = 32  # of relative positions, in an encoder and decoder
    max_distance: int = 128  # from which on all positions are of the last bucket
    init_factor: float = 0.05


class BinsConfig(NamedTuple):
    """Values as tokens: bins of equal width between two limits, after division by the mean of
    absolute values.
    """

    low: float
    high: float
    num_tokens: int  # special ones included
    num_special: int
    pad: int
    eos: int
    use_eos: bool  # whether it ends a context


class SamplingDefaults(NamedTuple):
    """How Chronos-T5 draws where a caller does not say."""

    num_samples: int
    temperature: float
    top_k: int
    top_p: float


class ChronosT5Config(NamedTuple):
    """Chronos (2024): an encoder-decoder of T5 over bins."""

    stack: StackConfig
    bins: BinsConfig
    sampling: SamplingDefaults
    context_length: int
    prediction_length: int  # that it was trained for
    start: int = 0  # token before a decoder's first

    @property
    def vocab_size(self) -> int:
        """Rows of the table of tokens."""
        return self.bins.num_tokens


class ChronosBoltConfig(NamedTuple):
    """Chronos-Bolt (2024): patches in, quantiles of all steps out of one token of a decoder."""

    stack: StackConfig
    context_length: int
    prediction_length: int
    patch: int
    quantiles: tuple[float, ...]
    use_reg_token: bool
    start: int = 0
    reg: int = 1

    @property
    def vocab_size(self) -> int:
        """Tokens that are no patches: the decoder's first and, if there is one, REG."""
        return 1 + self.use_reg_token


def bolt_config(model: ModelConfig) -> ChronosBoltConfig:
    """That of a forecaster of ours, whose weights start as large as those of T5 do."""
    forecast = model.forecast
    stack = StackConfig(
        width=model.width,
        num_heads=model.num_heads,
        head_width=model.head_width,
        hidden=model.hidden,
        num_layers=model.num_layers,
        num_decoder_layers=forecast.decoder_layers,
        norm_eps=model.norm_eps,
        init_factor=1.0,
    )
    return ChronosBoltConfig(
        stack,
        forecast.context_length,
        forecast.prediction_length,
        forecast.patch,
        forecast.quantiles,
        use_reg_token=True,
    )


class Chronos2Config(NamedTuple):
    """Chronos-2 (2025): an encoder over patches that also attends between the series of a group."""

    stack: StackConfig
    context_length: int
    patch: int
    max_output_patches: int  # in one pass
    quantiles: tuple[float, ...]
    use_reg_token: bool
    use_arcsinh: bool
    time_scale: int  # steps for which the time encoding grows by 1
    rope_theta: float
    reg: int = 1

    @property
    def prediction_length(self) -> int:
        """Steps that one pass can give."""
        return self.max_output_patches * self.patch

    @property
    def vocab_size(self) -> int:
        """Tokens that are no patches."""
        return 1 + self.use_reg_token


ChronosConfig = ChronosT5Config | ChronosBoltConfig | Chronos2Config
