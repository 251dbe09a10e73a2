"""Causal attention within documents, with grouped heads and an optional sliding window; and
attention to whatever a mask leaves, with biases on the scores.

Back ends: `reference` writes all scores out (for tests); `blockwise` walks blocks of queries, keeps
one block's scores at a time, skips blocks that the causal or window mask empties, and recomputes
scores in a hand-written backward pass (as in FlashAttention, Dao et al., 2022), on any platform;
`cudnn` is cuDNN's fused kernel for half precision on GPU. `auto` takes `cudnn` where it applies and
`blockwise` elsewhere.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from moe_jax.ops.attention.blockwise import blockwise_attention
from moe_jax.ops.attention.reference import MASKED, reference_attention, visible
from moe_jax.parallel.collectives import vary, vary_alike, vma
from moe_jax.runtime.platform import default_platform
from moe_jax.utils.annotations import Array, Bool, Float, Int

AttentionImpl = Literal["auto", "reference", "blockwise", "cudnn"]


def attention(
    q_BSHQ: Float[Array, "B S H Q"],
    k_BSGQ: Float[Array, "B S G Q"],
    v_BSGU: Float[Array, "B S G U"],
    segments_BS: Int[Array, "B S"],
    *,
    window: int | None = None,
    scale: float | None = None,
    sinks_H: Float[Array, " H"] | None = None,
    impl: AttentionImpl = "auto",
) -> Float[Array, "B S H U"]:
    """Softmax attention of each query over earlier keys (itself included) of the same segment.

    H is a multiple of G: query head h reads key head h // (H/G). Scores are multiplied by `scale`,
    by default Q**-0.5, and kept in f32. `window` limits how many tokens back a query sees, itself
    included. `sinks_H` are scores of one more key a head, whose value is zero (gpt-oss, 2025). The
    result has q's dtype. Raises ValueError for an unknown `impl`, and where cudnn cannot do what is
    asked.
    """
    scale = q_BSHQ.shape[-1] ** -0.5 if scale is None else scale
    if impl == "auto":
        half = q_BSHQ.dtype in (jnp.bfloat16, jnp.float16)
        alike = sinks_H is None and v_BSGU.shape[-1] == q_BSHQ.shape[-1]
        fused = half and alike and default_platform().fused_attention
        impl = "cudnn" if fused else "blockwise"
    if (
        sinks_H is None and impl == "blockwise"
    ):  # a sink that takes nothing; it varies like the queries, below
        sinks_H = jnp.full(q_BSHQ.shape[2], MASKED, jnp.float32)
    q_BSHQ, k_BSGQ, v_BSGU, segments_BS = vary_alike(q_BSHQ, k_BSGQ, v_BSGU, segments_BS)
    if impl == "blockwise":
        assert sinks_H is not None
        return blockwise_attention(
            q_BSHQ,
            k_BSGQ,
            v_BSGU,
            vary(sinks_H.astype(jnp.float32), vma(q_BSHQ)),
            segments_BS,
            window,
            scale,
        )
    mask_BSS = visible(segments_BS, 0, segments_BS.shape[1], 0, segments_BS.shape[1], window)
    if impl == "cudnn":
        if sinks_H is not None or v_BSGU.shape[-1] != q_BSHQ.shape[-1]:
            raise ValueError(
                "impl='cudnn' knows neither sinks nor values of another width: use blockwise"
            )
        return jax.nn.dot_product_attention(
            q_BSHQ, k_BSGQ, v_BSGU, mask=mask_BSS[:, None], scale=scale, implementation="cudnn"
        )
    if impl == "reference":
        return reference_attention(q_BSHQ, k_BSGQ, v_BSGU, mask_BSS, scale, sinks_H)
    raise ValueError(
        f"impl={impl!r} is not a back end of attention: use auto, reference, blockwise or cudnn"
    )


def full_attention(
    q_BSHQ: Float[Array, "B S H Q"],
    k_BMGQ: Float[Array, "B M G Q"],
    v_BMGU: Float[Array, "B M G U"],
    mask_BSM: Bool[Array, "#B #S M"],
    *,
    bias_HSM: Float[Array, "H S M"] | None = None,
    scale: float = 1.0,
) -> Float[Array, "B S H U"]:
    """Softmax attention of each query over the keys that the mask leaves, in both directions, as
    encoders and their decoders have it; where it leaves none, the mean of all values.

    `bias_HSM` is added to the scores, which are multiplied by `scale` and kept in f32, all at once.
    """
    return reference_attention(q_BSHQ, k_BMGQ, v_BMGU, mask_BSM, scale, None, bias_HSM)
