"""The mixture of Chronos-Bolt's form in training: the same on every mesh, and all is trained."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from moe_jax.models.paths import by_path, path_of
from moe_jax.placement.table import EMPTY, Placement
from moe_jax.training.state import StepStats, TrainState
from moe_jax.training.step import TrainProgram
from tests.support.small_forecasters import (
    BATCH,
    EXPERTS,
    LAYERS,
    TOP_K,
    make_program,
    make_windows,
)
from tests.support.tiny_programs import moved

LOSSES = dict(aux_loss=0.1, sequence_aux_loss=0.1, z_loss=0.1, bias_rate=0.05)
STEPS = 3
Run = tuple[list[StepStats], dict[str, np.ndarray]]


def in_logical_order(tree: Any, expert_LP: np.ndarray) -> dict[str, np.ndarray]:
    """Arrays by path, the first slot of each expert."""
    first_LE = np.argmax(expert_LP[:, None] == np.arange(EXPERTS)[:, None], axis=-1)

    def one(keys: Any, leaf: jax.Array) -> np.ndarray:
        array = np.asarray(leaf)
        if not path_of(keys).is_expert:
            return array
        return np.stack([layer[slots] for layer, slots in zip(array, first_LE, strict=True)])

    return by_path(jax.tree.map_with_path(one, tree))


def run(program: TrainProgram, move: Placement | None = None) -> Run:
    """Figures of some steps, and the first step's gradients in logical order. With `move` experts
    go there after the first step.
    """
    state, figures, gradients = program.init(7), [], {}
    for step in range(STEPS):
        state, stats = program.train_step(state, program.shard(make_windows(step)))
        figures.append(jax.tree.map(np.asarray, stats))
        if not step:  # the first moments are a tenth of the clipped gradients
            gradients = in_logical_order(state.opt_state[0].mu, np.asarray(state.expert_LP))
            state = state if move is None else moved(program, state, move)
    assert program.train_step._cache_size() == 1
    return figures, gradients


@pytest.fixture(scope="module")
def alone() -> Run:
    return run(make_program(**LOSSES))


# The seven other slots of each rank are shuffled, one expert has three replicas, slots are empty.
MOVED = Placement(
    np.array([[0, 5, EMPTY, 2, 0, 7, 1, 6, 3, 4, 0, EMPTY]] * LAYERS, np.int32), EXPERTS, 4
)
MESHES = {
    "2x4, moved": ((2, 4, 1), dict(redundant=1, accumulation=2, dispatch="pooled"), MOVED),
    "2x2x2": ((2, 2, 2), {}, None),
    "1x8": ((1, 8, 1), dict(dispatch="pooled", capacity_factor=0.5), None),
    "4x2, gathered": ((4, 2, 1), dict(dispatch="gather"), None),
}


@pytest.mark.parametrize(
    ("mesh", "settings", "move"),
    [
        pytest.param(*case, id=name, marks=[] if name == "2x4, moved" else [pytest.mark.slow])
        for name, case in MESHES.items()
    ],
)
def test_sharded_is_alone(alone: Run, mesh: Any, settings: Any, move: Placement | None) -> None:
    """Losses, gradients and counts, with experts that move in the middle."""
    figures, gradients = run(make_program(*mesh, **settings, **LOSSES), move)
    for ours, theirs in zip(figures, alone[0], strict=True):
        for name in ("loss", "ce_loss", "aux_loss", "z_loss", "grad_norm"):
            np.testing.assert_allclose(
                getattr(ours, name), getattr(theirs, name), rtol=2e-5, err_msg=name
            )
        np.testing.assert_array_equal(ours.layers.router.load_E, theirs.layers.router.load_E)
        np.testing.assert_array_equal(ours.layers.kept, theirs.layers.kept)
    assert gradients.keys() == alone[1].keys()
    for path, gradient in alone[1].items():
        np.testing.assert_allclose(gradients[path], gradient, atol=1e-6, err_msg=path)


def test_each_series_has_one_route_which_counts_once(alone: Run) -> None:
    for stats in alone[0]:
        router = stats.layers.router
        assert router.tokens.tolist() == [BATCH] * LAYERS
        assert router.load_E.sum(axis=1).tolist() == [BATCH * TOP_K] * LAYERS
        np.testing.assert_array_equal(router.load_E[0], router.load_E[1])
        assert stats.layers.kept.tolist() == [BATCH * TOP_K] * LAYERS
        share, prob = router.load_E[0] / (BATCH * TOP_K), router.prob_E[0] / BATCH
        switch = EXPERTS * np.sum(share * prob)
        by_series = router.sequence_aux[0] / BATCH
        assert stats.aux_loss == pytest.approx(0.1 * switch + 0.1 * by_series, rel=1e-5)


def test_everything_is_trained_router_experts_and_decoder_among_it(alone: Run) -> None:
    """The decoder has one token: what its attention would choose by has nothing to choose from."""
    idle = {"decoder_bias/table", *(f"stacks/1/blocks/0/attention/{x}" for x in ("query", "key"))}
    figures, gradients = alone
    used = figures[0].layers.router.load_E[0] > 0
    for path, gradient in gradients.items():
        assert np.any(gradient) == (path not in idle), path
        if "/mlp/experts/" in path:  # those that a series chose, and no others
            trained = np.any(gradient, axis=tuple(range(2, gradient.ndim)))
            np.testing.assert_array_equal(trained, np.stack([used] * LAYERS), err_msg=path)


def test_moments_cover_all_parameters() -> None:
    program = make_program()
    state: TrainState = program.abstract_state
    shapes = {path: leaf.shape for path, leaf in by_path(state.params).items()}
    assert {path: leaf.shape for path, leaf in by_path(state.opt_state[0].mu).items()} == shapes
    assert shapes["router/weight"] == (16, EXPERTS)
    assert shapes["stacks/1/blocks/0/mlp/experts/gate_up"] == (LAYERS, EXPERTS, 16, 1, 8)
