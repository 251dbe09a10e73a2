"""What one training step does to its state, beside the invariants of tests/test_invariants.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.training.state import StepStats, TrainState
from moe_jax.training.step import TrainProgram
from tests.support.tiny_programs import EXPERTS, make_batch, make_program

BETA1 = 0.9


def one_step(program: TrainProgram) -> tuple[TrainState, TrainState, StepStats]:
    """The state before and after the first step, on the host, and the step's statistics."""
    state = program.init(7)
    before = jax.tree.map(np.array, state)
    after, stats = program.train_step(state, program.shard(make_batch(0)))
    return before, jax.tree.map(np.asarray, after), jax.tree.map(np.asarray, stats)


@pytest.mark.parametrize(
    "share",
    [
        pytest.param(0.25, id="above the limit"),
        pytest.param(4.0, id="below it", marks=pytest.mark.slow),
    ],
)
def test_gradients_are_clipped_to_the_limit_and_no_further(share: float) -> None:
    """Adam's first moment is (1 - beta1) of the gradient that it got; its updates do not show a
    gradient's scale.
    """
    _, _, free = one_step(make_program(optimizer=dict(clip_norm=1e9)))
    norm = float(free.grad_norm)
    limit = share * norm
    _, after, stats = one_step(make_program(optimizer=dict(clip_norm=limit, beta1=BETA1)))
    assert stats.grad_norm == pytest.approx(norm, rel=1e-6)  # told as it was before clipping
    moments = jax.tree.leaves(after.opt_state[0].mu)
    got = np.sqrt(sum(np.sum(np.square(m, dtype=np.float64)) for m in moments)) / (1 - BETA1)
    assert got == pytest.approx(min(limit, norm), rel=1e-4)


@pytest.mark.slow
def test_every_step_draws_noise_of_its_own() -> None:
    """The same state and batch at another step: routers see other noise."""
    program = make_program(moe=dict(input_noise=0.5))
    batch, loads = program.shard(make_batch(0)), []
    for step in (0, 1, 1):
        state = program.init(7)
        state = state._replace(step=jax.device_put(jnp.int32(step), state.step.sharding))
        _, stats = program.train_step(state, batch)
        loads.append(np.asarray(stats.layers.router.load_E))
    assert not np.array_equal(loads[0], loads[1])
    np.testing.assert_array_equal(loads[1], loads[2])


def test_the_learning_rate_of_each_step_is_the_schedules() -> None:
    """The first step has 1 / warmup of the peak, and the step after the warmup all of it."""
    program = make_program(optimizer=dict(warmup_steps=4, learning_rate=0.1))
    state, rates = program.init(7), []
    for step in range(5):
        state, stats = program.train_step(state, program.shard(make_batch(step)))
        rates.append(float(stats.lr))
    np.testing.assert_allclose(rates, [0.025, 0.04375, 0.0625, 0.08125, 0.1], rtol=1e-5)
    assert state.step == 5


def test_the_bias_falls_for_busy_experts_and_rises_for_idle_ones() -> None:
    before, after, stats = one_step(make_program(moe=dict(bias_rate=0.05)))
    load_LE = stats.layers.router.load_E
    change_LE = after.tables.bias_E - before.tables.bias_E
    mean_L1 = load_LE.mean(axis=1, keepdims=True)
    assert np.any(load_LE > mean_L1) and np.any(load_LE < mean_L1)
    assert np.all(change_LE[load_LE > mean_L1] < 0) and np.all(change_LE[load_LE < mean_L1] > 0)


def test_a_gradient_that_overflows_is_skipped_though_the_loss_is_finite() -> None:
    before, after, stats = one_step(make_program(moe=dict(z_loss=1e25)))
    assert np.isfinite(stats.loss) and not np.isfinite(stats.grad_norm)
    assert (stats.skipped, stats.skipped_in_row, after.step) == (1, 1, 1)
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, before.opt_state)


def test_the_loss_is_the_sum_of_its_parts() -> None:
    losses = dict(aux_loss=0.1, z_loss=0.01)
    _, _, stats = one_step(make_program(moe=losses))
    assert min(stats.ce_loss, stats.aux_loss, stats.z_loss) > 0
    assert stats.loss == pytest.approx(stats.ce_loss + stats.aux_loss + stats.z_loss)
    assert stats.layers.router.load_E.shape == (2, EXPERTS)


def test_the_gradients_are_those_of_the_reported_loss() -> None:
    """Along a random direction, by differences."""
    program = make_program(moe=dict(aux_loss=0.0))
    state, batch, key = program.init(7), program.shard(make_batch(0)), jax.random.key(0)
    grads, losses = jax.jit(program.gradients)(state.params, batch, state.tables, key)
    rng = np.random.default_rng(0)
    scale = state.params["final_norm"]["scale"]
    direction = jnp.asarray(rng.standard_normal(scale.shape), jnp.float32)

    def loss(size: float) -> float:
        params = state.params | {"final_norm": {"scale": scale + size * direction}}
        total, count = program.eval_step(params, state.tables, batch)
        return float(total / count)

    assert losses.ce_loss == pytest.approx(loss(0.0), rel=1e-5)
    slope = (loss(1e-2) - loss(-1e-2)) / 2e-2
    got = float(jnp.vdot(grads["final_norm"]["scale"], direction))
    assert got == pytest.approx(slope, rel=2e-2, abs=1e-4)
