"""Splash attention: JAX's kernel for TPU, which keeps a block of scores on the chip and skips
blocks that the causal or window mask empties.

The library's own gradient cannot be used under `check_vma`, for what its backward pass gives is not
typed by the mesh axes over which it varies. So the two directions are called here each by itself.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as library,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)

from moe_jax.parallel.collectives import without_types

BLOCK_SIZES = (512, 256, 128)  # tokens, the first that divides a sequence


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def splash_attention(
    q_BSHQ, k_BSGQ, v_BSGU, segments_BS, window: int | None, scale: float, interpret: bool = False
) -> jax.Array:
    """`attention` without sinks, where `splash_fits` (api.py); `interpret` runs the kernel on any
    platform, slowly.
    """
    return _forward(q_BSHQ, k_BSGQ, v_BSGU, segments_BS, window, scale, interpret)[0]


def _forward(
    q_BSHQ, k_BSGQ, v_BSGU, segments_BS, window: int | None, scale: float, interpret: bool
):
    kernel = _kernel(*q_BSHQ.shape[1:3], window, interpret)

    def run(q, k, v, segments):
        return kernel(q, k, v, library.SegmentIds(segments, segments))

    q, k, v = _by_head(q_BSHQ, scale), _by_head(k_BSGQ), _by_head(v_BSGU)
    out_BHSU, (logsum_BHS,) = without_types(jax.vmap(run), q, k, v, segments_BS)
    # The kernel writes each sum 128 times: until the one is cut out, all are held.
    out_BHSU, logsum_BHS = lax.optimization_barrier((out_BHSU, logsum_BHS))
    saved = (q_BSHQ, k_BSGQ, v_BSGU, segments_BS, out_BHSU, logsum_BHS)
    return jnp.swapaxes(out_BHSU, 1, 2), saved


def _backward(window: int | None, scale: float, interpret: bool, saved, dout_BSHU: jax.Array):
    q_BSHQ, k_BSGQ, v_BSGU, segments_BS, out_BHSU, logsum_BHS = saved
    kernel = _kernel(*q_BSHQ.shape[1:3], window, interpret)

    def run(q, k, v, segments, out, logsum, dout):
        ids = library.SegmentIds(segments, segments)
        residuals = (q, k, v, ids, None, out, logsum, kernel.dq_mask_info, kernel.dkv_mask_info)
        options = {name: kernel.kwargs[name] for name in _BACKWARD}
        return library._splash_attention_bwd(
            save_residuals=False, res=residuals, do=dout, **options
        )[3:6]

    q, k, v = _by_head(q_BSHQ, scale), _by_head(k_BSGQ), _by_head(v_BSGU)
    dout_BHSU = _by_head(dout_BSHU)
    gradients = without_types(jax.vmap(run), q, k, v, segments_BS, out_BHSU, logsum_BHS, dout_BHSU)
    dq, dk, dv = (jnp.swapaxes(gradient, 1, 2) for gradient in gradients)
    return (dq * scale).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


splash_attention.defvjp(_forward, _backward)

_BACKWARD = (
    *("mask_value", "is_mqa", "block_sizes", "residual_checkpoint_name"),
    *("mask_function", "attn_logits_soft_cap", "interpret"),
)


_SIZES = (
    *("block_q", "block_kv", "block_kv_compute"),
    *("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq"),
)


def _by_head(x_BSHQ: jax.Array, scale: float = 1.0) -> jax.Array:
    """[B, H, S, Q], scaled: the kernel takes scores as they are."""
    x_BHSQ = jnp.swapaxes(x_BSHQ, 1, 2)
    return x_BHSQ if scale == 1.0 else (x_BHSQ * scale).astype(x_BHSQ.dtype)


@lru_cache(maxsize=64)
def _kernel(length: int, heads: int, window: int | None, interpret: bool) -> Any:
    """The library's kernel, with what it has to know of the mask."""
    block = next(size for size in BLOCK_SIZES if length % size == 0)
    sizes: dict[str, Any] = dict.fromkeys(_SIZES, block)
    shape = (length, length)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    with jax.ensure_compile_time_eval():
        kernel = library.make_splash_mha_single_device(
            masks.MultiHeadMask([mask] * heads),
            block_sizes=library.BlockSizes(**sizes),
            save_residuals=True,
            interpret=interpret,
        )
    return jax.tree.map(np.asarray, kernel)
