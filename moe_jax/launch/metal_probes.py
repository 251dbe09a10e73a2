"""What plug-ins for a Mac's GPU are known to get wrong, tried in tiny form for `moe-jax doctor`.

Each fault has a probe, as those of probes.py, and what the package does about it: it works round
some faults, and of others it says what not to use. `moe-jax doctor --platform metal-on-cpu` runs
them on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from moe_jax.launch.probes import probe_grouped_matmul, random_normal, require_equal


class KnownFault(NamedTuple):
    """A fault to look for."""

    name: str
    probe: Callable[[], str]
    workaround: str = ""
    """What the package does in place of it, where it does not matter."""
    remedy: str = ""
    """What to leave out, where it matters."""


def probe_stacked_outputs() -> str:
    """A loop that stacks what its turns give (jax-mps 0.10.11 can overwrite parts of it)."""
    import jax
    import jax.numpy as jnp

    x = random_normal(64, 3, 129)

    def turn(carry: Any, row: Any) -> Any:
        carry = carry * 0.5 + row
        return carry, (carry[:, ::2], jnp.sum(carry, axis=1))

    _, (found, sums) = jax.jit(lambda x: jax.lax.scan(turn, jnp.zeros(x.shape[1:]), x))(x)
    wanted, carry = [], np.zeros(x.shape[1:])
    for row in x:
        carry = carry * 0.5 + row
        wanted.append(carry)
    require_equal(np.asarray(found), np.stack(wanted)[:, :, ::2], 1e-4)
    require_equal(np.asarray(sums), np.stack(wanted).sum(axis=2), 1e-4)
    return f"{len(x)} turns come out whole"


def probe_scatter() -> str:
    """An index out of bounds is dropped (jax-mps issue 240)."""
    import jax
    import jax.numpy as jnp

    put = jax.jit(lambda at: jnp.zeros(4, jnp.int32).at[at].set(7, mode="drop"))
    require_equal(np.asarray(put(np.array([1, 4, 99], np.int32))), np.array([0, 7, 0, 0]), 0)
    return "an index out of bounds is dropped"


def probe_top_k_ties() -> str:
    """Of equal values the first come first."""
    import jax

    values = np.array([[1, 3, 3, 0, 3, 3, 2, 1]], np.float32)
    _, found = jax.jit(lambda x: jax.lax.top_k(x, 5))(values)
    require_equal(np.asarray(found), np.array([[1, 2, 4, 5, 6]]), 0)
    return "the first of equal values come first"


def probe_mixed_dot() -> str:
    """A product of bf16 matrices whose results are f32."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((2, 300), jnp.bfloat16)
    y = x.at[0, 0].set(1.0078125)  # their product is a sum that bf16 does not have
    product = jax.jit(lambda x, y: jnp.matmul(x, y.T, preferred_element_type=jnp.float32))
    require_equal(np.asarray(product(x, y)), np.array([[300.0078125, 300.0]] * 2), 1e-6)
    return "f32 results"


def probe_accumulation() -> str:
    """A product of bf16 matrices with bf16 results is added up in f32."""
    import jax
    import jax.numpy as jnp

    from moe_jax.ops.products import dot

    ones = jnp.ones((2, 512), jnp.bfloat16)  # in bf16 their sum would stop at 256
    found = jax.jit(lambda x: dot(x, x, ((1,), (1,)), jnp.bfloat16))(ones)
    require_equal(np.asarray(found, np.float32), np.full((2, 2), 512.0), 0)
    return "adds up in f32"


def probe_sort() -> str:
    """A stable order by one key."""
    import jax
    import jax.numpy as jnp

    keys = np.array([3, 1, 2, 1, 3, 1, 0, 2] * 5, np.int32)
    found = jax.jit(lambda x: jnp.argsort(x, stable=True))(keys)
    require_equal(np.asarray(found), np.argsort(keys, kind="stable"), 0)
    return "stable by one key"


def probe_sort_by_two() -> str:
    """An order by two keys."""
    import jax

    first, second = np.array([1, 0, 1, 0], np.int32), np.array([1, 3, 0, 2], np.int32)
    place = np.arange(4, dtype=np.int32)
    sort = jax.jit(lambda *keys: jax.lax.sort(keys, num_keys=2))
    require_equal(np.asarray(sort(first, second, place)[2]), np.array([3, 1, 2, 0]), 0)
    return "by two keys"


def probe_unpacking() -> str:
    """Two 4-bit values per byte, with scales."""
    import jax
    import jax.numpy as jnp

    from moe_jax.ops.quantized import PackedWeight, dequantize

    steps = np.arange(256, dtype=np.int64)
    scale = np.linspace(0.5, 2, 8).astype(np.float32)
    packed = PackedWeight(
        jnp.asarray(steps.reshape(2, 128), jnp.uint8), jnp.asarray(scale.reshape(2, 4)), "int4"
    )
    found = jax.jit(lambda w: dequantize(w, jnp.float32))(packed)
    grouped = steps.reshape(2, 4, 32)
    wanted = (np.concatenate([grouped & 15, grouped >> 4], -1) - 8) * scale.reshape(2, 4, 1)
    require_equal(np.asarray(found), wanted.reshape(2, 256), 1e-6)
    return "equals numpy"


def probe_packed_matmul() -> str:
    """Rows through the chosen experts' packed matrices, few and many of them."""
    import jax
    import jax.numpy as jnp

    from moe_jax.ops.grouped_matmul.api import grouped_matmul
    from moe_jax.ops.quantized import dequantize, quantize

    w = quantize(jnp.asarray(random_normal(3, 6, 16)), "int8")
    plain = np.asarray(dequantize(w, jnp.float32))
    for sizes in ([5, 0, 11], [40, 3, 57]):
        x = random_normal(sum(sizes), 16)
        found = jax.jit(lambda x, w, sizes: grouped_matmul(x, w, sizes))(
            x, w, jnp.array(sizes, jnp.int32)
        )
        group_N = np.repeat(np.arange(3), sizes)
        require_equal(np.asarray(found), np.einsum("nd,nfd->nf", x, plain[group_N]), 0.03)
    return "equals numpy, for few rows and many"


def probe_model() -> str:
    """The logits of a model of two layers after its prompt and two more tokens."""
    from moe_jax.launch.small_model import RECORDED, small_model_logits

    require_equal(small_model_logits(), np.array(RECORDED), 1e-3)
    return f"logits of {len(RECORDED)} steps equal those recorded"


KNOWN_FAULTS = (
    KnownFault(
        "stacked loop outputs",
        probe_stacked_outputs,
        workaround="training writes its layers one after another, not as a loop",
    ),
    KnownFault(
        "scatter out of bounds",
        probe_scatter,
        workaround="what goes nowhere goes to a row of its own",
    ),
    KnownFault(
        "top-k ties",
        probe_top_k_ties,
        workaround="texts may differ from a CPU's where two scores are equal",
    ),
    KnownFault(
        "bf16 dot to f32",
        probe_mixed_dot,
        workaround="operands are converted where the result must be f32",
    ),
    KnownFault("bf16 dot", probe_accumulation, remedy="use --dtype float32"),
    KnownFault("sort", probe_sort, remedy="use --platform cpu"),
    KnownFault("sort by two keys", probe_sort_by_two, workaround="sorts by one key after another"),
    KnownFault("uint8 unpacking", probe_unpacking, remedy="leave out --quantize int4"),
    KnownFault("grouped matmul", lambda: probe_grouped_matmul("auto"), remedy="use --platform cpu"),
    KnownFault("packed grouped matmul", probe_packed_matmul, remedy="use --platform cpu"),
    KnownFault("model of two layers", probe_model, remedy="use --platform cpu"),
)
