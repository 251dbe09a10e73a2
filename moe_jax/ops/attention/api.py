"""Causal attention within documents, with grouped heads and an optional sliding window; and
attention to whatever a mask leaves, with biases on the scores.

Back ends: `reference` writes all scores out (for tests); `blockwise` walks blocks of queries, keeps
one block's scores at a time, skips blocks that the causal or window mask empties, and recomputes
scores in a hand-written backward pass (as in FlashAttention, Dao et al., 2022), on any platform;
`cudnn` is cuDNN's fused kernel for half precision on GPU; `splash` is JAX's kernel for TPU, for
heads and sequences in multiples of 128 without sinks. `auto` takes a kernel where it applies and
`blockwise` elsewhere.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from moe_jax.errors import UserError
from moe_jax.ops.attention.blockwise import blockwise_attention
from moe_jax.ops.attention.reference import MASKED, reference_attention, visible
from moe_jax.parallel.collectives import vary, vary_alike, vma
from moe_jax.runtime.platform import default_platform
from moe_jax.utils.annotations import Array, Bool, Float, Int

AttentionImpl = Literal["auto", "reference", "blockwise", "cudnn", "splash"]


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
    asked; UserError where splash cannot.
    """
    scale = q_BSHQ.shape[-1] ** -0.5 if scale is None else scale
    if impl == "auto":
        impl = _choose(q_BSHQ, v_BSGU, sinks_H)
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
    if impl == "splash":
        _check_splash(q_BSHQ, v_BSGU, sinks_H)
        from moe_jax.ops.attention.splash import splash_attention

        return splash_attention(q_BSHQ, k_BSGQ, v_BSGU, segments_BS, window, scale)
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
        f"impl={impl!r} is not a back end of attention: use auto, reference, blockwise, cudnn "
        f"or splash"
    )


def _choose(q_BSHQ: jax.Array, v_BSGU: jax.Array, sinks_H: jax.Array | None) -> AttentionImpl:
    """The fastest back end of this platform for such operands."""
    platform, half = default_platform(), q_BSHQ.dtype in (jnp.bfloat16, jnp.float16)
    if sinks_H is None and half:
        if platform.fused_attention and v_BSGU.shape[-1] == q_BSHQ.shape[-1]:
            return "cudnn"
        if platform.splash_attention and splash_fits(q_BSHQ, v_BSGU):
            return "splash"
    return "blockwise"


def _check_splash(q_BSHQ: jax.Array, v_BSGU: jax.Array, sinks_H: jax.Array | None) -> None:
    platform = default_platform()
    if not platform.splash_attention:
        reason = f"a kernel for TPU, and this is {platform.name}"
    elif sinks_H is not None:
        reason = "a kernel that knows no sinks"
    elif not splash_fits(q_BSHQ, v_BSGU):
        reason = (
            f"a kernel for sequences and heads in multiples of 128; here are sequences of "
            f"{q_BSHQ.shape[1]}, and heads of {q_BSHQ.shape[-1]} with values of {v_BSGU.shape[-1]}"
        )
    else:
        return
    raise UserError(f"model.attention=splash is {reason}: use auto or blockwise.")


def splash_fits(q_BSHQ: jax.Array, v_BSGU: jax.Array) -> bool:
    """Whether the kernel for TPU takes such heads and sequences."""
    return not any(size % 128 for size in (q_BSHQ.shape[1], q_BSHQ.shape[-1], v_BSGU.shape[-1]))


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
