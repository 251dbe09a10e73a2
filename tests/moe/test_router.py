from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_jax.config.model import MoEConfig
from moe_jax.config.schema import MeshConfig
from moe_jax.moe.load_balancing import (
    losses,
    pooled_loss,
    switch_loss,
    update_bias,
    variance_loss,
)
from moe_jax.moe.router import Router, RouterStats, Routing, select, total
from moe_jax.parallel.collectives import BATCH_AXES
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.sharding import spec

pytestmark = pytest.mark.usefixtures("strict_promotion")


@partial(jax.jit, static_argnums=(0, 1))
def _route(config: MoEConfig, mesh, x, valid, bias, keys):
    def local(weight, x, valid, bias, keys):
        router = Router(config, config.num_experts, rngs=nnx.Rngs(0))
        router.weight.set_value(weight)
        routing, stats = router(x, valid, bias, keys)
        return routing, total(stats)

    in_specs = (spec(("width", "experts")), P(BATCH_AXES), P(BATCH_AXES), P(), P(BATCH_AXES))
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=in_specs, out_specs=(Routing(P(BATCH_AXES), P(BATCH_AXES)), P())
    )
    return sharded(jnp.eye(config.num_experts), x, valid, bias, keys)


def route(
    config: MoEConfig, logits, valid=None, bias=None, keys=None, data=1, expert=1
) -> tuple[Routing, RouterStats]:
    """Routes tokens whose logits are given, [B, S, E]: the router's weight is the identity."""
    x = jnp.array(logits, jnp.float32)
    valid = jnp.ones(x.shape[:2], bool) if valid is None else jnp.array(valid)
    bias = jnp.zeros(config.num_experts) if bias is None else jnp.array(bias, jnp.float32)
    return _route(config, make_mesh(MeshConfig(data=data, expert=expert)), x, valid, bias, keys)


def random_logits(batch: int, length: int, experts: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, length, experts)).astype(np.float32)


FOUR = np.log([[[0.1, 0.3, 0.2, 0.4]]])  # their softmax is these probabilities


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        (dict(normalize="before"), [0.4, 0.3]),
        (dict(normalize="after"), [4 / 7, 3 / 7]),
        (dict(normalize="before", routed_scale=2.5), [1.0, 0.75]),
    ],
)
def test_softmax_weights_best_first(settings, weights):
    routing, _ = route(MoEConfig(num_experts=4, top_k=2, **settings), FOUR)
    assert routing.expert_TK.tolist() == [[3, 1]]
    np.testing.assert_allclose(routing.weight_TK, [weights], rtol=1e-6)


def test_temperature_divides_logits():
    """At temperature 2 the odds are square roots: 1, 2, 3, 4 of 10."""
    routing, stats = route(
        MoEConfig(num_experts=4, top_k=4, temperature=2.0), np.log([[[1.0, 9.0, 4.0, 16.0]]])
    )
    np.testing.assert_allclose(routing.weight_TK, [[0.4, 0.3, 0.2, 0.1]], rtol=1e-6)
    np.testing.assert_allclose(stats.z, np.log(10) ** 2, rtol=1e-6)


def test_sigmoid_scores_with_a_bias_that_moves_the_choice_but_not_the_weight():
    logits = np.log([[[1.0, 3.0, 1 / 3, 9.0]]])  # sigmoids 0.5, 0.75, 0.25, 0.9
    config = MoEConfig(num_experts=4, top_k=2, score="sigmoid")
    routing, _ = route(config, logits)
    assert routing.expert_TK.tolist() == [[3, 1]]
    np.testing.assert_allclose(routing.weight_TK, [[0.9 / 1.65, 0.75 / 1.65]], rtol=1e-6)
    routing, stats = route(config, logits, bias=[0, 0, 0.6, 0])
    assert routing.expert_TK.tolist() == [[3, 2]]
    np.testing.assert_allclose(routing.weight_TK, [[0.9 / 1.15, 0.25 / 1.15]], rtol=1e-6)
    np.testing.assert_allclose(stats.prob_E, np.array([0.5, 0.75, 0.25, 0.9]) / 2.4, rtol=1e-6)
    routing, _ = route(
        MoEConfig(num_experts=4, top_k=2, score="sigmoid", normalize="before"), logits
    )
    np.testing.assert_allclose(routing.weight_TK, [[0.9, 0.75]], rtol=1e-6)


@pytest.mark.parametrize(
    ("score", "bias", "experts"),
    [
        # Groups count by their best: 0.9, 0.5, 0.6, 0.4, so the first and third are open.
        ("softmax", [0.0] * 8, [0, 4, 5]),
        # By their two best: 0.9, 0.95, 0.7, 0.7, so the first and second.
        ("sigmoid", [0.0] * 8, [0, 2, 3]),
        # A bias counts in both the choice of groups and of experts.
        ("sigmoid", [0.0] * 6 + [1.0, 0.0], [6, 2, 3]),
    ],
)
def test_group_limited_selection(score, bias, experts):
    scores = jnp.array([[[0.9, 0.0, 0.5, 0.45, 0.6, 0.1, 0.4, 0.3]]])
    config = MoEConfig(
        num_experts=8, top_k=3, num_groups=4, top_groups=2, score=score, normalize="before"
    )
    chosen, weights = select(config, scores, jnp.array(bias), None)
    assert chosen.ravel().tolist() == experts
    np.testing.assert_allclose(weights.ravel(), scores.ravel()[np.array(experts)])


def test_input_noise_follows_the_key_of_its_sequence_and_not_the_mesh():
    config = MoEConfig(num_experts=8, top_k=8, input_noise=0.2, normalize="before")
    logits = random_logits(8, 5, 8)
    keys = jax.random.split(jax.random.key(3), 8)
    quiet, _ = route(config, logits)
    noisy, stats = route(config, logits, keys=keys)
    assert np.max(np.abs(quiet.weight_TK - noisy.weight_TK)) > 1e-3
    for data, expert in ((2, 4), (8, 1)):
        again, again_stats = route(config, logits, keys=keys, data=data, expert=expert)
        np.testing.assert_allclose(again.weight_TK, noisy.weight_TK, rtol=1e-5)
        np.testing.assert_allclose(again_stats.prob_E, stats.prob_E, rtol=1e-5)
    other, _ = route(config, logits, keys=keys[::-1])
    assert np.max(np.abs(other.weight_TK - noisy.weight_TK)) > 1e-3


def test_input_noise_stays_within_its_bounds():
    config = MoEConfig(num_experts=2, top_k=1, input_noise=0.25)
    logits = np.zeros((1, 400, 2), np.float32)
    logits[..., 1] = np.log(2)  # the noisy logit is between 0.75 and 1.25 ln 2
    _, stats = route(config, logits, keys=jax.random.split(jax.random.key(0), 1))
    mean = stats.prob_E[1] / 400
    uniform = np.linspace(0.75, 1.25, 100_001) * np.log(2)
    np.testing.assert_allclose(mean, np.mean(1 / (1 + np.exp(-uniform))), atol=0.01)


def test_expert_dropout_takes_experts_from_whole_sequences():
    config = MoEConfig(num_experts=8, top_k=2, expert_dropout=0.5)
    logits = random_logits(16, 30, 8)
    routing, _ = route(config, logits, keys=jax.random.split(jax.random.key(1), 16))
    used = np.array(
        [np.isin(np.arange(8), sequence) for sequence in routing.expert_TK.reshape(16, -1)]
    )
    assert 0.3 < used.mean() < 0.7  # about half of the experts, for 60 choices of a sequence
    assert len({tuple(row) for row in used}) > 8  # not the same ones
    everywhere, _ = route(config, logits)
    assert np.isin(np.arange(8), everywhere.expert_TK.reshape(16, -1)[0]).all()
    scattered, _ = route(
        config, logits, keys=jax.random.split(jax.random.key(1), 16), data=2, expert=4
    )
    np.testing.assert_array_equal(scattered.expert_TK, routing.expert_TK)


def test_a_token_without_enough_experts_left_takes_dropped_ones():
    config = MoEConfig(num_experts=4, top_k=2)
    dropped = jnp.array([[True, True, True, False], [True, True, True, True]])
    scores = jnp.broadcast_to(jnp.array([0.4, 0.3, 0.2, 0.1]), (2, 1, 4))
    chosen, weights = select(config, scores, jnp.zeros(4), dropped)
    assert chosen[0, 0, 0] == 3
    assert len(set(chosen[1, 0].tolist())) == 2
    np.testing.assert_allclose(jnp.sum(weights, axis=-1), 1.0, rtol=1e-6)


def test_statistics_of_one_token():
    _, stats = route(MoEConfig(num_experts=4, top_k=2), FOUR + 1.5)
    probs = np.array([0.1, 0.3, 0.2, 0.4])
    assert stats.load_E.tolist() == [0, 1, 0, 1]
    assert stats.tokens == 1
    np.testing.assert_allclose(stats.prob_E, probs, rtol=1e-6)
    np.testing.assert_allclose(stats.z, 1.5**2, rtol=1e-5)  # the logsumexp is 0 + 1.5
    np.testing.assert_allclose(stats.entropy, -np.sum(probs * np.log(probs)), rtol=1e-6)
    np.testing.assert_allclose(stats.sequence_aux, 4 * (0.5 * 0.3 + 0.5 * 0.4), rtol=1e-6)


COEFFICIENTS = dict(aux_loss=0.5, z_loss=0.25, variance_loss=0.0, sequence_aux_loss=0.0)


def test_switch_loss_is_one_when_even_and_counts_the_experts_when_not():
    config = MoEConfig(num_experts=4, top_k=1, **COEFFICIENTS)
    even = np.tile(3.0 * np.eye(4), (2, 1, 1))  # token i prefers expert i
    _, stats = route(config, even)
    aux, z = losses(config, stats, stats)
    np.testing.assert_allclose(aux, 0.5 * 1.0, rtol=1e-6)
    np.testing.assert_allclose(z, 0.25 * np.log(np.exp(3) + 3) ** 2, rtol=1e-6)
    _, stats = route(config, np.full((2, 4, 4), [100.0, 0, 0, 0]))
    np.testing.assert_allclose(losses(config, stats, stats)[0], 0.5 * 4.0, rtol=1e-6)


def test_variance_loss_is_the_variance_of_usage():
    assert variance_loss(jnp.full(4, 0.25)) == 0
    np.testing.assert_allclose(
        variance_loss(jnp.array([0.1, 0.3, 0.2, 0.4])), np.var([0.4, 1.2, 0.8, 1.6]), rtol=1e-6
    )
    config = MoEConfig(
        num_experts=4, top_k=2, **COEFFICIENTS | dict(aux_loss=0.0, variance_loss=2.0)
    )
    _, stats = route(config, FOUR)
    np.testing.assert_allclose(
        losses(config, stats, stats)[0], 2.0 * np.var([0.4, 1.2, 0.8, 1.6]), rtol=1e-5
    )


def test_sequence_loss_sees_what_the_batch_hides():
    """Each sequence goes to one expert, another one for each: even over the batch, as uneven as can
    be within.
    """
    config = MoEConfig(
        num_experts=4, top_k=1, **COEFFICIENTS | dict(aux_loss=0.0, sequence_aux_loss=0.5)
    )
    logits = np.repeat(100.0 * np.eye(4)[:, None], 3, axis=1)
    _, stats = route(config, logits)
    np.testing.assert_allclose(losses(config, stats, stats)[0], 0.5 * 4.0, rtol=1e-6)
    share = stats.load_E.astype(jnp.float32) / 12
    np.testing.assert_allclose(switch_loss(share, stats.prob_E / 12), 1.0, rtol=1e-6)


def test_sequences_count_by_their_tokens():
    config = MoEConfig(
        num_experts=2, top_k=1, **COEFFICIENTS | dict(aux_loss=0.0, sequence_aux_loss=1.0)
    )
    logits = np.zeros((2, 4, 2))
    logits[0, :, 0] = 100.0  # all to one: 2
    logits[1, 0, 0] = logits[1, 1, 1] = 100.0  # even: 1
    _, stats = route(config, logits, valid=[[True] * 4, [True, True, False, False]])
    np.testing.assert_allclose(losses(config, stats, stats)[0], (4 * 2.0 + 2 * 1.0) / 6, rtol=1e-6)


@pytest.mark.parametrize(("data", "expert"), [(1, 1), (2, 2)])
def test_padding_changes_no_statistic(data, expert):
    config = MoEConfig(num_experts=4, top_k=2)
    logits = random_logits(4, 6, 4)
    valid = np.arange(6) < np.array([6, 4, 1, 0])[:, None]
    routing, stats = route(config, logits, valid=valid, data=data, expert=expert)
    other, other_stats = route(
        config, np.where(valid[..., None], logits, 50.0), valid=valid, data=data, expert=expert
    )
    assert np.all((routing.expert_TK == 4) == ~valid.reshape(-1)[:, None])
    np.testing.assert_array_equal(routing.expert_TK, other.expert_TK)
    for got, want in zip(stats, other_stats, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
    assert stats.tokens == valid.sum() and stats.load_E.sum() == 2 * valid.sum()
    # And they are those of the tokens by themselves.
    alone = [route(config, logits[b : b + 1, :n])[1] for b, n in enumerate([6, 4, 1])]
    for name in RouterStats._fields:
        np.testing.assert_allclose(
            getattr(stats, name), sum(getattr(a, name) for a in alone), rtol=1e-5, err_msg=name
        )


def test_a_batch_of_padding_costs_nothing():
    config = MoEConfig(
        num_experts=4, top_k=2, aux_loss=0.1, variance_loss=0.0, sequence_aux_loss=0.1, z_loss=0.1
    )
    _, stats = route(config, random_logits(1, 3, 4), valid=np.zeros((1, 3), bool))
    assert losses(config, stats, stats) == (0.0, 0.0)


def test_losses_of_parts_add_up_in_value_and_gradient():
    """Batch losses are not linear in the batch: the parts' gradients must still add up to the
    whole's.
    """
    config = MoEConfig(
        num_experts=4, top_k=2, aux_loss=0.3, variance_loss=0.7, sequence_aux_loss=0.2, z_loss=0.1
    )
    logits = jnp.array(2 * random_logits(4, 6, 4))
    valid = np.arange(6) < np.array([6, 4, 1, 2])[:, None]

    def stats_of(rows, logits):
        return route(config, logits[rows], valid=valid[rows])[1]

    def loss(rows, full, logits):
        stats = stats_of(rows, logits)
        return sum(losses(config, stats, stats if full is None else full))

    everything = slice(0, 4)
    full = stats_of(everything, logits)
    value, gradient = jax.value_and_grad(partial(loss, everything, None))(logits)
    parts = [
        jax.value_and_grad(partial(loss, rows, full))(logits) for rows in (slice(0, 1), slice(1, 4))
    ]
    np.testing.assert_allclose(sum(v for v, _ in parts), value, rtol=1e-6)
    np.testing.assert_allclose(sum(g for _, g in parts), gradient, atol=1e-7)
    assert np.max(np.abs(gradient)) > 1e-3
    # The gradient itself, by differences.
    direction = np.zeros((4, 6, 4), np.float32)
    direction[1, 2, 3], eps = 1.0, 1e-2
    slope = (
        loss(everything, None, logits + eps * direction)
        - loss(everything, None, logits - eps * direction)
    ) / (2 * eps)
    np.testing.assert_allclose(gradient[1, 2, 3], slope, rtol=0.02)


UNDERFLOWN = np.array([[[-200.0, -150.0, -151.0, -300.0], [-50.0, -200.0, -51.0, -49.0]]])


@pytest.mark.parametrize("normalize", ["after", "before"])
def test_sigmoids_that_underflow_have_statistics_and_gradients(normalize):
    """The sigmoid of -150 is 0 in f32; shares of scores do not need it, as exp(-150) / exp(-151) is
    e. The weights are the scores themselves, and stay 0.
    """
    config = MoEConfig(
        num_experts=4, top_k=2, score="sigmoid", normalize=normalize, sequence_aux_loss=0.1
    )

    def outcome(logits):
        routing, stats = route(config, logits)
        aux, z = losses(config, stats, stats)
        return aux + z + jnp.sum(routing.weight_TK * jnp.array([2.0, 1.0])), (routing, stats)

    logits = jnp.array(UNDERFLOWN, jnp.float32)
    gradient, (routing, stats) = jax.grad(outcome, has_aux=True)(logits)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
    for name, value in stats._asdict().items():
        assert np.isfinite(value).all(), name
    np.testing.assert_array_equal(routing.weight_TK[0], 0.0)
    share = np.exp(UNDERFLOWN - UNDERFLOWN.max(axis=-1, keepdims=True))
    wanted = (share / share.sum(axis=-1, keepdims=True)).sum((0, 1))
    np.testing.assert_allclose(stats.prob_E, wanted, rtol=1e-5)


def test_a_loss_without_a_coefficient_is_not_computed():
    """Logits of 1e25 have a z-loss beyond f32; 0 times that would be no number."""
    logits = np.array([[[1e25, 0.0, 0.0, -1e25]]])
    config = MoEConfig(num_experts=4, top_k=2, aux_loss=0.0, z_loss=0.0)
    _, stats = route(config, logits)
    assert np.isinf(stats.z)
    broken = stats._replace(prob_E=jnp.full(4, jnp.nan), sequence_aux=jnp.float32(jnp.nan))
    assert losses(config, broken, broken) == (0.0, 0.0)
    pooled = dataclasses.replace(config, aux_over="model")
    layers = jax.tree.map(lambda a: a[None], broken)
    assert pooled_loss(pooled, layers, layers) == 0.0
    # One that has a coefficient is, whatever the others have.
    for name in ("aux_loss", "variance_loss", "sequence_aux_loss"):
        aux, z = losses(dataclasses.replace(config, **{name: 1.0}), broken, broken)
        assert np.isnan(aux) and z == 0.0, name


def test_the_bias_rises_for_idle_experts_and_falls_for_busy_ones():
    bias = jnp.array([[0.0, 0.5, -0.25, 0.0], [0.0, 0.0, 0.0, 0.0]])
    load = jnp.array([[0, 20, 10, 10], [7, 7, 7, 7]], jnp.int32)
    np.testing.assert_allclose(
        update_bias(bias, load, 0.125), [[0.125, 0.375, -0.25, 0.0], [0.0] * 4]
    )


def test_the_router_learns_through_the_weights_and_not_through_the_bias():
    config = MoEConfig(num_experts=4, top_k=2)

    def weighted(logits, bias):
        scores = jax.nn.softmax(logits)
        _, weights = select(config, scores, bias, None)
        return jnp.sum(weights * jnp.array([1.0, -1.0]))

    logits = jnp.array([[[0.1, 0.9, -0.4, 0.5]]])
    dlogits, dbias = jax.grad(weighted, argnums=(0, 1))(logits, jnp.zeros(4))
    np.testing.assert_array_equal(dbias, 0.0)
    # Renormalised, the two chosen weights are a softmax of their own: w = sigmoid(0.9 - 0.5), d(w -
    # (1 - w)) = 2w(1-w).
    w = 1 / (1 + np.exp(-0.4))
    np.testing.assert_allclose(
        dlogits.ravel(), [0, 2 * w * (1 - w), 0, -2 * w * (1 - w)], atol=1e-6
    )
