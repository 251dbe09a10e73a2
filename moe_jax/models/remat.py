"""What the backward pass computes again instead of keeping."""

from __future__ import annotations

from typing import Any

import jax

from moe_jax.moe.dispatch import TABLES

# What only moves or retypes values. A gathered parameter reaches its matmul through some of these,
# so refusing to keep the gather's own output is not enough. JAX has renamed primitives before:
# tests/models/test_remat.py notices.
MOVES = frozenset(
    (
        "all_gather",
        "reshape",
        "transpose",
        "squeeze",
        "broadcast_in_dim",
        "convert_element_type",
        "pvary",
        "pcast",
        "slice",
        "dynamic_slice",
    )
)


def remat(choice: str, body: Any) -> Any:
    """`body` with the policy of `model.remat`. Gathered parameters are never kept: holding them
    would undo their sharding. Tables of dispatch always are: they are small, and each sort takes
    the TPU's compiler 9 to 28 s.
    """
    policies = jax.checkpoint_policies
    policy = {
        "none": _computed,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "full": policies.nothing_saveable,
    }[choice]
    policy = policies.save_from_both_policies(policy, policies.save_only_these_names(TABLES))
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


def _computed(primitive: Any, *_: Any, **__: Any) -> bool:
    """A rematerialisation policy: keep what was computed, not what was only moved."""
    return primitive.name not in MOVES
