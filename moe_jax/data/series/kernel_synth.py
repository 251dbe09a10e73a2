"""KernelSynth (arXiv 2403.07815, algorithm 2): series drawn from Gaussian processes whose kernels
are put together at random.

Up to five kernels of a bank are taken, with replacement, and joined from left to right, each by a
sum or a product; a series is one draw at equally spaced places of [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import scipy.linalg

LENGTH = 1024
MOST_KERNELS = 5

# Steps of a season: of hours, half hours, quarters of an hour, days, weeks, months, ...
_PERIODS = (24, 48, 96, 168, 336, 672, 7, 14, 30, 60, 365, 730, 4, 26, 52, 4, 6, 12, 4, 40, 10)
# What is added to the diagonal, of the mean variance: rounding makes matrices of smooth kernels
# indefinite. The smallest is a noise of 1e-5 of the series.
_JITTERS = (1e-10, 1e-8, 1e-6)

Kernel = Callable[[int], np.ndarray]  # covariances [n, n] of n places


def _stationary(covariance: Callable[[np.ndarray], np.ndarray]) -> Kernel:
    """A kernel of the distance alone: a view of the 2 n - 1 covariances there are."""

    def matrix(length: int) -> np.ndarray:
        row = covariance(np.linspace(0, 1, length))
        both = np.concatenate([row[:0:-1], row])
        return np.lib.stride_tricks.sliding_window_view(both, length)[::-1]

    return matrix


def _periodic(period: int) -> Kernel:
    # A period of so many steps of a series of LENGTH, whatever the length.
    return _stationary(lambda d: np.exp(-2 * np.sin(np.pi * d * len(d) / period) ** 2))


def _squared_exponential(scale: float) -> Kernel:
    return _stationary(lambda d: np.exp(-((d / scale) ** 2) / 2))


def _rational_quadratic(alpha: float) -> Kernel:
    return _stationary(lambda d: (1 + d**2 / (2 * alpha)) ** -alpha)


def _white(sigma: float) -> Kernel:
    return _stationary(lambda d: sigma**2 * (d == 0.0))


def _linear(sigma: float) -> Kernel:
    def covariance(length: int) -> np.ndarray:
        x = np.linspace(0, 1, length)
        return sigma**2 + np.outer(x, x)

    return covariance


KERNELS: tuple[Kernel, ...] = (
    *map(_periodic, _PERIODS),
    *map(_linear, (0.0, 1.0, 10.0)),
    *map(_squared_exponential, (0.1, 1.0, 10.0)),
    *map(_rational_quadratic, (0.1, 1.0, 10.0)),
    *map(_white, (0.1, 1.0)),
    _stationary(np.ones_like),
)
"""The bank of the paper: 33 of them."""


def kernel_series(number: int, *, seed: int = 0, length: int = LENGTH) -> np.ndarray:
    """The series of a number, f32 [length]: the same for the same seed, whichever are made beside
    it.
    """
    rng = np.random.default_rng([seed, number])
    while True:
        chosen = rng.integers(len(KERNELS), size=rng.integers(1, MOST_KERNELS + 1))
        covariance = np.array(KERNELS[chosen[0]](length))
        for kernel in chosen[1:]:
            join = np.add if rng.random() < 0.5 else np.multiply
            join(covariance, KERNELS[kernel](length), out=covariance)
        series = _draw(covariance, rng)
        if series is not None:
            return series.astype(np.float32)


def _draw(covariance: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """A draw from the process, or None where its covariances are no such matrix in f64."""
    variance = np.trace(covariance) / len(covariance)
    noise = rng.standard_normal(len(covariance))
    for jitter in _JITTERS:
        matrix = covariance.copy()
        matrix[np.diag_indices_from(matrix)] += jitter * variance
        try:  # of the transpose, which is the same, and which LAPACK takes without another copy
            root = scipy.linalg.cholesky(matrix.T, lower=True, overwrite_a=True, check_finite=False)
        except np.linalg.LinAlgError:
            continue
        return root @ noise
    return None


def kernel_synth(count: int, *, seed: int = 0, length: int = LENGTH) -> Iterator[np.ndarray]:
    """The first `count` series of a seed, f32 [length] each, one at a time."""
    return (kernel_series(number, seed=seed, length=length) for number in range(count))
