from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config.model import RopeConfig
from moe_jax.models.rope import frequencies, rotate

HEAD = 8


def test_unscaled_frequencies_are_powers_of_the_base():
    frequency, scale = frequencies(RopeConfig(theta=10_000.0), HEAD, length=64)
    np.testing.assert_allclose(frequency, [1.0, 0.1, 0.01, 0.001])  # 10000 ** -(2i/8)
    assert scale == 1.0


def test_linear_divides_every_frequency():
    frequency, scale = frequencies(RopeConfig(scaling="linear", factor=4.0), HEAD, length=64)
    np.testing.assert_allclose(frequency, [0.25, 0.025, 0.0025, 0.00025])
    assert scale == 1.0


def test_dynamic_stretches_the_base_beyond_the_original_length_only():
    config = RopeConfig(scaling="dynamic", factor=2.0, original_length=64)
    np.testing.assert_allclose(frequencies(config, HEAD, length=64)[0], [1.0, 0.1, 0.01, 0.001])
    # At 128 tokens the base grows by (2 * 128/64 - 1) ** (8/6) = 3 ** (4/3), so frequency i by 3 **
    # -(i/3).
    frequency, scale = frequencies(config, HEAD, length=128)
    np.testing.assert_allclose(
        frequency, [1.0, 0.1 * 3 ** (-1 / 3), 0.01 * 3 ** (-2 / 3), 0.001 / 3]
    )
    assert scale == 1.0


def test_llama3_keeps_short_waves_divides_long_ones_and_blends_between():
    config = RopeConfig(
        theta=10_000.0,
        scaling="llama3",
        factor=8.0,
        original_length=1000,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    frequency, scale = frequencies(config, HEAD, length=8000)
    # Turns over the original length: 1000 f / 2 pi = 159, 15.9, 1.59, 0.159; kept above 4, divided
    # below 1.
    kept = (1000 * 0.01 / (2 * math.pi) - 1) / 3
    np.testing.assert_allclose(
        frequency, [1.0, 0.1, 0.01 * kept + 0.01 / 8 * (1 - kept), 0.001 / 8]
    )
    assert scale == 1.0


def test_yarn_ramps_between_its_two_dimensions_and_warms_the_softmax():
    config = RopeConfig(
        theta=10_000.0,
        scaling="yarn",
        factor=4.0,
        original_length=1000,
        beta_fast=32.0,
        beta_slow=1.0,
    )
    frequency, scale = frequencies(config, HEAD, length=4000)
    # The dimension that turns b times in 1000 tokens: 8 ln(1000 / (2 pi b)) / (2 ln 10000): 0.697
    # for 32 and 2.202 for 1, so the ramp runs from dimension 0 to dimension 3.
    ramp = np.array([0, 1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(frequency, np.array([1.0, 0.1, 0.01, 0.001]) * (1 - ramp + ramp / 4))
    assert scale == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize("scaling", ["linear", "dynamic", "llama3", "yarn"])
def test_a_factor_of_one_changes_nothing(scaling):
    config = RopeConfig(scaling=scaling, factor=1.0, original_length=4096)
    frequency, scale = frequencies(config, 64, length=4096)
    np.testing.assert_allclose(frequency, frequencies(RopeConfig(), 64, length=4096)[0])
    assert scale == 1.0


def test_rotation_by_a_quarter_turn():
    x = jnp.array([1.0, 0.0, 2.0, 0.0]).reshape(
        1, 1, 1, 4
    )  # pairs (1, 2) and (0, 0): the first half against the second
    turned = rotate(x, jnp.array([[3]], jnp.int32), np.array([math.pi / 6, 0.1]))
    np.testing.assert_allclose(turned.ravel(), [-2.0, 0.0, 1.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(
        rotate(x, jnp.array([[3]], jnp.int32), np.array([math.pi / 6, 0.1]), 1.5),
        1.5 * turned,
        atol=1e-6,
    )


def test_scores_depend_on_the_distance_alone_and_lengths_are_kept():
    rng = np.random.default_rng(0)
    q, k = (jnp.array(rng.standard_normal((1, 1, 1, HEAD)).astype(np.float32)) for _ in range(2))
    frequency, _ = frequencies(RopeConfig(), HEAD, length=64)

    def score(i, j):
        at = (jnp.array([[n]], jnp.int32) for n in (i, j))
        return jnp.sum(rotate(q, next(at), frequency) * rotate(k, next(at), frequency))

    assert score(9, 4) == pytest.approx(float(score(45, 40)), abs=1e-5)
    assert score(9, 4) != pytest.approx(float(score(9, 5)), abs=1e-3)
    np.testing.assert_allclose(
        jnp.linalg.norm(rotate(q, jnp.array([[7]], jnp.int32), frequency)),
        jnp.linalg.norm(q),
        rtol=1e-6,
    )


def test_half_precision_in_and_out_with_angles_in_f32():
    """Position 1001 is no bf16 number: an angle kept in bf16 would be a turn off."""
    x = jnp.ones((1, 1, 1, HEAD), jnp.bfloat16)
    frequency, _ = frequencies(RopeConfig(), HEAD, length=2048)
    half = rotate(x, jnp.array([[1001]], jnp.int32), frequency)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        half.astype(jnp.float32),
        rotate(x.astype(jnp.float32), jnp.array([[1001]], jnp.int32), frequency),
        atol=0.01,
    )


def test_a_head_of_width_two_can_be_stretched():
    frequency, _ = frequencies(
        RopeConfig(scaling="dynamic", factor=2.0, original_length=64), 2, length=128
    )
    np.testing.assert_allclose(frequency, [1.0])
