"""Optimizers and schedules, from optax; this file chooses and groups."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax.config.schema import OptimizerConfig

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


def make_optimizer(config: OptimizerConfig, axes: Any) -> optax.GradientTransformationExtraArgs:
    """The transformation for a tree of parameters whose logical dimension names are `axes` (see
    sharding.py).

    `update` takes two more arguments: `lr`, the learning rate, and `ok`, without which updates are
    zero and the state stays as it was. Weight decay touches matrices only. Clipping is the
    caller's: its norm must not count replicas twice.
    """
    matrix = jax.tree.map_with_path(lambda path, _: _is_matrix(path), axes, is_leaf=_is_axes)
    scale = jax.tree.map_with_path(
        lambda path, names: _group_scale(config, path), axes, is_leaf=_is_axes
    )
    decay = optax.add_decayed_weights(config.weight_decay, mask=matrix)
    if config.name == "adamw":
        core = _adam(config)
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


def _adam(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """optax's Adam, with the moments finished before anything is computed from them.

    Left to itself XLA:CPU computes the new moments again from the old ones in the parameters'
    update, for which it must first copy the old ones (docs/log.md has the cost).
    """
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)

    def update(
        grads: Any, state: Any, params: Any = None, *, ok: jax.Array, **_: Any
    ) -> tuple[Any, Any]:
        new = jax.lax.optimization_barrier(_select(ok, adam.update(grads, state, params)[1], state))
        mu = optax.tree.bias_correction(new.mu, config.beta1, new.count)
        nu = optax.tree.bias_correction(new.nu, config.beta2, new.count)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + config.eps), mu, nu), new

    return optax.GradientTransformationExtraArgs(adam.init, update)


def _is_axes(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(name, str) for name in value)


def _is_matrix(path: tuple[Any, ...]) -> bool:
    """Whether a parameter multiplies: no norm's scale, no bias, no attention sink."""
    name = str(getattr(path[-1], "key", path[-1]))
    return name not in ("scale", "sinks") and not name.endswith("bias")


def _group_scale(config: OptimizerConfig, path: tuple[Any, ...]) -> float:
    names = {getattr(entry, "key", None) for entry in path}
    return (
        config.expert_lr_scale
        if "experts" in names
        else config.router_lr_scale
        if "router" in names
        else 1.0
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
