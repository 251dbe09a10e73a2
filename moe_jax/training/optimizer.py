"""Optimizers and schedules, from optax; this file chooses and groups.

Ours where optax has the like, because the state's tree is the checkpoint's and updates are the same
to the last bit: `_unless_broken` and `TrainState.skipped` (`optax.conditionally_mask` and
`apply_if_finite` keep counters of their own in the state), the scales of experts and routers
(`optax.partition` nests the moments by group; `optax.masked(optax.scale(...))` rounds in another
order).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax.config.schema import OptimizerConfig
from moe_jax.errors import UserError
from moe_jax.models.paths import path_of

# Muon (Jordan et al., 2024) scaled to AdamW's typical update size, so that one learning rate serves
# both (Moonlight, Liu et al., 2025).
MUON_RMS = 0.2


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of each step: linear warmup from 1/warmup, then the chosen shape down to its
    final fraction.
    """
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    warmup = min(config.warmup_steps, steps - 1)
    rest = max(steps - warmup, 1)
    shapes = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, final, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction),
        "wsd": lambda: optax.linear_schedule(
            peak, final, max(rest // 5, 1), transition_begin=rest - max(rest // 5, 1)
        ),
    }
    after = shapes[config.schedule]()
    if warmup == 0:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(peak / warmup, peak, warmup), after], [warmup]
    )


def make_optimizer(
    config: OptimizerConfig, axes: Any, *, finish_moments: bool = True
) -> optax.GradientTransformationExtraArgs:
    """The transformation for a tree of parameters whose logical dimension names are `axes` (see
    parallel/sharding.py).

    `update` takes two more arguments: `lr`, the learning rate, and `ok`, without which updates are
    zero and the state stays as it was. Weight decay touches matrices only. Clipping is the
    caller's: its norm must not count replicas twice. `finish_moments` is for XLA:CPU (`_adam`).
    """
    matrix = jax.tree.map_with_path(lambda path, _: path_of(path).is_matrix, axes, is_leaf=_is_axes)
    scale = jax.tree.map_with_path(
        lambda path, names: _group_scale(config, path), axes, is_leaf=_is_axes
    )
    decay = optax.add_decayed_weights(config.weight_decay, mask=matrix)
    if config.name == "adamw":
        core = _adam(config, finish_moments)
    elif config.name == "adafactor":
        core = optax.chain(_unless_broken(optax.scale_by_factored_rms()), _clip_rms(axes))
    else:
        core = optax.chain(_unless_broken(_muon(config, axes)), optax.scale(-1.0))

    def finish(
        updates: Any, state: Any, params: Any = None, *, ok: jax.Array, lr: jax.Array, **_: Any
    ) -> tuple[Any, Any]:
        return jax.tree.map(lambda u, s: jnp.where(ok, -lr * s * u, 0.0), updates, scale), state

    return optax.chain(
        core, decay, optax.GradientTransformationExtraArgs(optax.init_empty_state, finish)
    )


def _select(ok: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)


def _unless_broken(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The transformation with a state that changes only if `ok`."""

    def update(
        grads: Any, state: Any, params: Any = None, *, ok: jax.Array, **_: Any
    ) -> tuple[Any, Any]:
        updates, new = inner.update(grads, state, params)
        return updates, _select(ok, new, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _adam(config: OptimizerConfig, finish_moments: bool) -> optax.GradientTransformationExtraArgs:
    """optax's Adam; with `finish_moments` the moments are finished before anything is computed from
    them.

    Left to itself XLA:CPU computes the new moments again from the old ones in the parameters'
    update, for which it must first copy the old ones (docs/log.md has the cost). Elsewhere a
    barrier would only keep XLA from fusing the two.
    """
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)

    def update(
        grads: Any, state: Any, params: Any = None, *, ok: jax.Array, **_: Any
    ) -> tuple[Any, Any]:
        new = _select(ok, adam.update(grads, state, params)[1], state)
        if finish_moments:
            new = jax.lax.optimization_barrier(new)
        mu = optax.tree.bias_correction(new.mu, config.beta1, new.count)
        nu = optax.tree.bias_correction(new.nu, config.beta2, new.count)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + config.eps), mu, nu), new

    return optax.GradientTransformationExtraArgs(adam.init, update)


def _is_axes(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(name, str) for name in value)


def _group_scale(config: OptimizerConfig, keys: tuple[Any, ...]) -> float:
    path = path_of(keys)
    if path.is_expert:
        return config.expert_lr_scale
    return config.router_lr_scale if path.is_router else 1.0


def refuse_mixed_slots(params: Any) -> None:
    """Raises UserError where Adafactor's moments would depend on the placement: it keeps means over
    the two largest dims of an array from 128 on, and one of them would be the slots.
    """
    for keys, leaf in jax.tree.leaves_with_path(params):
        dims = np.argsort(leaf.shape, stable=True)[-2:]
        if path_of(keys).is_expert and 1 in dims and leaf.shape[dims[0]] >= 128:
            raise UserError(
                f"optimizer.name=adafactor would mix the moments of a layer's {leaf.shape[1]} "
                f"slots, whose experts are smaller "
                f"({' x '.join(map(str, leaf.shape[2:]))}): choose adamw or muon."
            )


def _clip_rms(axes: Any) -> optax.GradientTransformation:
    """Adafactor's bound of 1 on the RMS of an update, for each layer and slot by itself: empty
    slots must not lower it.
    """

    def clip(update: jax.Array, names: tuple[str, ...]) -> jax.Array:
        first = update.ndim - len(names) + (names[0] == "slots")
        mean = jnp.mean(update * update, axis=tuple(range(first, update.ndim)), keepdims=True)
        return update / jnp.maximum(1.0, jnp.sqrt(mean))

    return optax.stateless(lambda updates, _: jax.tree.map(clip, updates, axes))


def _muon(config: OptimizerConfig, axes: Any) -> optax.GradientTransformation:
    """Muon for projections, by the sides of their matrix; AdamW for embeddings, routers and
    norms.
    """

    def sides(names: tuple[str, ...]) -> Any:
        widths = [i - len(names) for i, name in enumerate(names) if name in ("width", "slot_width")]
        others = [
            i - len(names)
            for i, name in enumerate(names)
            if name in ("heads", "kv_heads", "head", "hidden", "expert_hidden", "latent")
        ]
        if not widths or not others:
            return None
        into, out = (widths, others) if widths[0] < others[0] else (others, widths)
        return optax.contrib.MuonDimensionNumbers(tuple(into), tuple(out))

    dims = jax.tree.map(sides, axes, is_leaf=_is_axes)
    return optax.contrib.muon(
        1.0,
        eps=config.eps,
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        muon_weight_dimension_numbers=dims,
        consistent_rms=MUON_RMS,
    )
