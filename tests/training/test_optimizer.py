from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.config.schema import OptimizerConfig
from moe_jax.training.optimizer import make_optimizer, make_schedule
from tests.support.slow import slow_unless
from tests.support.tiny_programs import make_batch, make_program

OPTIMIZERS = ["adamw", "adafactor", "muon"]

AXES = {
    "query": ("width", "heads", "head"),
    "mlp": {
        "experts": {"down": ("slots", "hidden", "slot_width")},
        "router": {"weight": ("width", "experts")},
    },
    "norm": {"scale": ("norm",)},
}


def params(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    shapes = {
        "query": (2, 6, 2, 4),  # stacked over two layers
        "mlp": {"experts": {"down": (2, 3, 8, 6)}, "router": {"weight": (2, 6, 3)}},
        "norm": {"scale": (2, 6)},
    }
    return jax.tree.map(
        lambda s: jnp.array(rng.standard_normal(s), jnp.float32),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )


def updates(config: OptimizerConfig, grads: dict, at: dict) -> dict:
    """What the second of two steps adds, with a gradient ten times that of the first."""
    optimizer, schedule = make_optimizer(config, AXES), make_schedule(config, 100)

    @jax.jit
    def two_steps(grads, at):
        _, state = optimizer.update(
            grads, optimizer.init(at), at, ok=jnp.bool_(True), lr=jnp.float32(schedule(0))
        )
        return optimizer.update(
            jax.tree.map(lambda g: 10 * g, grads),
            state,
            at,
            ok=jnp.bool_(True),
            lr=jnp.float32(schedule(1)),
        )[0]

    return two_steps(grads, at)


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        # 10 steps of warmup of 110, down to a tenth: {step: share of the peak}
        ("constant", {0: 0.1, 5: 0.55, 10: 1.0, 110: 1.0}),
        ("linear", {0: 0.1, 5: 0.55, 10: 1.0, 60: 0.55, 110: 0.1, 200: 0.1}),
        ("cosine", {0: 0.1, 5: 0.55, 10: 1.0, 60: 0.55, 110: 0.1, 200: 0.1}),
        ("wsd", {0: 0.1, 5: 0.55, 10: 1.0, 60: 1.0, 90: 1.0, 100: 0.55, 110: 0.1, 200: 0.1}),
    ],
)
def test_schedules(shape, values):
    config = OptimizerConfig(schedule=shape, learning_rate=2.0, warmup_steps=10, final_fraction=0.1)
    schedule = make_schedule(config, 110)
    for step, share in values.items():
        np.testing.assert_allclose(schedule(step), 2.0 * share, rtol=1e-5, err_msg=f"step {step}")


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 20), (2, 20), (5, 20), (3, 0)])
def test_short_runs_have_a_learning_rate_at_every_step(shape, steps, warmup):
    config = OptimizerConfig(schedule=shape, learning_rate=1.0, warmup_steps=warmup)
    values = [float(make_schedule(config, steps)(step)) for step in range(steps)]
    assert all(0 < value <= 1 for value in values)
    assert max(values) == 1.0  # the peak is reached


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_shrinks_matrices_and_leaves_norms_alone(name):
    config = OptimizerConfig(
        name=name, learning_rate=0.5, warmup_steps=0, schedule="constant", weight_decay=0.1
    )
    at = params()
    moved = updates(config, jax.tree.map(jnp.zeros_like, at), at)
    assert not np.any(moved["norm"]["scale"])
    for got, parameter in zip(
        jax.tree.leaves({**moved, "norm": None}), jax.tree.leaves({**at, "norm": None}), strict=True
    ):
        np.testing.assert_allclose(got, -0.5 * 0.1 * parameter, rtol=1e-5)


def test_decay_leaves_biases_and_sinks_alone():
    axes = {
        "query": ("width", "heads", "head"),
        "query_bias": ("heads", "head"),
        "mlp": {"router": {"bias": ("experts",)}},
        "sinks": ("heads",),
    }
    shapes = {
        "query": (2, 6, 2, 4),
        "query_bias": (2, 2, 4),
        "mlp": {"router": {"bias": (2, 3)}},
        "sinks": (2, 2),
    }
    at = jax.tree.map(jnp.ones, shapes, is_leaf=lambda shape: isinstance(shape, tuple))
    config = OptimizerConfig(learning_rate=0.5, weight_decay=0.1)
    optimizer = make_optimizer(config, axes)
    zeros = jax.tree.map(jnp.zeros_like, at)
    moved, _ = optimizer.update(
        zeros, optimizer.init(at), at, ok=jnp.bool_(True), lr=jnp.float32(0.5)
    )
    np.testing.assert_allclose(moved.pop("query"), -0.05, rtol=1e-6)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(moved))


def test_finished_moments_change_no_update():
    at, grads, config = params(), params(1), OptimizerConfig()
    moved = []
    for finish_moments in (True, False):
        optimizer = make_optimizer(config, AXES, finish_moments=finish_moments)
        update = jax.jit(optimizer.update)
        _, state = update(grads, optimizer.init(at), at, ok=jnp.bool_(True), lr=jnp.float32(0.1))
        moved.append(update(grads, state, at, ok=jnp.bool_(True), lr=jnp.float32(0.1)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *moved)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_experts_and_routers_have_learning_rates_of_their_own(name):
    at, grads = params(), params(1)
    plain = OptimizerConfig(name=name)
    base = updates(plain, grads, at)
    scaled = updates(
        OptimizerConfig(name=name, expert_lr_scale=0.5, router_lr_scale=0.0), grads, at
    )
    np.testing.assert_allclose(
        scaled["mlp"]["experts"]["down"], 0.5 * base["mlp"]["experts"]["down"], rtol=1e-6
    )
    np.testing.assert_array_equal(scaled["mlp"]["router"]["weight"], 0.0)
    np.testing.assert_array_equal(scaled["query"], base["query"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_expert_moves_the_same_whatever_slot_it_is_in(name):
    """Nothing may couple slots: neither their order nor empty ones beside them."""
    at, grads = params(), params(1)
    config = OptimizerConfig(name=name)
    base = updates(config, grads, at)["mlp"]["experts"]["down"]

    def in_slots(tree, table):
        tree = jax.tree.map(lambda a: a, tree)
        down = tree["mlp"]["experts"]["down"]
        padded = jnp.concatenate([down, jnp.zeros_like(down[:, :1])], axis=1)
        tree["mlp"]["experts"]["down"] = padded[:, np.array(table)]
        return tree

    table = [2, 0, 1, -1, -1, -1]
    moved = updates(config, in_slots(grads, table), in_slots(at, table))["mlp"]["experts"]["down"]
    np.testing.assert_allclose(moved[:, :3], base[:, np.array(table[:3])], rtol=1e-4, atol=1e-7)
    assert not np.any(moved[:, 3:])


def test_adamw_is_adamw():
    config = OptimizerConfig(
        learning_rate=0.3,
        warmup_steps=0,
        schedule="constant",
        weight_decay=0.2,
        beta1=0.8,
        beta2=0.9,
        eps=1e-6,
    )
    at, grads = params(), params(1)
    reference = optax.adamw(
        0.3, 0.8, 0.9, 1e-6, weight_decay=0.2, mask={"query": True, "mlp": True, "norm": False}
    )
    _, state = reference.update(grads, reference.init(at), at)
    want, _ = reference.update(jax.tree.map(lambda g: 10 * g, grads), state, at)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates(config, grads, at), want
    )


def test_muon_makes_the_update_of_a_projection_nearly_orthogonal():
    """All singular values of a matrix's update are alike, with heads and head width as one side; a
    router's are not touched so.
    """
    moved = updates(OptimizerConfig(name="muon", weight_decay=0.0), params(1), params())
    for layer in range(2):
        values = np.linalg.svd(np.asarray(moved["query"][layer]).reshape(6, 8), compute_uv=False)
        assert values.max() / values.min() < 2
        for expert in range(3):
            values = np.linalg.svd(
                np.asarray(moved["mlp"]["experts"]["down"][layer, expert]), compute_uv=False
            )
            assert values.max() / values.min() < 2
    np.testing.assert_allclose(
        np.abs(moved["mlp"]["router"]["weight"]),
        np.abs(moved["mlp"]["router"]["weight"]).max(),
        rtol=1e-3,
    )


@pytest.mark.parametrize("name", slow_unless("muon".__eq__, OPTIMIZERS))
def test_a_model_learns_a_batch_by_heart(name):
    program = make_program(
        1,
        2,
        optimizer=dict(name=name, learning_rate=0.03),
        moe=dict(dropless=False, capacity_factor=2.0),
    )
    state, batch = program.init(0), program.shard(make_batch())
    losses = []
    for _ in range(12):
        state, figures = program.train_step(state, batch)
        losses.append(float(figures.loss))
    assert losses[0] == pytest.approx(np.log(32), abs=0.3)
    assert losses[-1] < losses[0] - 0.7, losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_broken_step_moves_nothing(name):
    optimizer = make_optimizer(OptimizerConfig(name=name), AXES)
    at = params()
    update = jax.jit(optimizer.update)
    _, state = update(params(1), optimizer.init(at), at, ok=jnp.bool_(True), lr=jnp.float32(0.1))
    moved, after = update(
        jax.tree.map(lambda g: g * jnp.nan, params(2)),
        state,
        at,
        ok=jnp.bool_(False),
        lr=jnp.float32(0.1),
    )
    assert all(not np.any(u) for u in jax.tree.leaves(moved))
    jax.tree.map(np.testing.assert_array_equal, after, state)
