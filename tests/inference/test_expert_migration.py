"""Experts of a model that is served move as they are held, and nothing else does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_jax.config.schema import MeshConfig
from moe_jax.inference.engine import ResidentEngine
from moe_jax.inference.load import find_model
from moe_jax.inference.restore import serving_placement
from moe_jax.models.layer_pattern import expert_layers
from moe_jax.models.paths import ParameterPath, by_path
from moe_jax.moe.tables import make_tables
from moe_jax.placement.table import EMPTY, Placement, contiguous
from tests.support.hf_folder import make_folder
from tests.support.small_models import case, load

EXPERTS, LAYERS = 4, 4


def held(engine: ResidentEngine) -> dict[str, np.ndarray]:
    """The weights by path, on the host."""
    return {path: np.asarray(array).copy() for path, array in by_path(engine.params).items()}


@pytest.mark.parametrize(
    "options",
    [dict(dtype="bfloat16"), dict(quantization="int4", group=4)],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_experts_are_where_the_new_table_says(options: dict[str, Any]) -> None:
    """Biases too, on a mesh that splits them over `tensor`, from empty slots to replicas and back
    to other places.
    """
    table = contiguous(LAYERS, EXPERTS, 2, 1)
    loaded = load(case("biases"), {"expert": 2, "tensor": 2}, placement=table, **options)
    engine: Any = loaded.engine
    before = held(engine)
    assert engine.let_experts_move() >= 3
    first = [[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2], [0, 1, 2, 3, EMPTY, 1], [1, 3, 0, 2, 3, 1]]
    second = [[3, 1, 0, 2, 1, 0], [0, 1, 2, 3, 0, 1], [2, 3, 1, 0, 2, EMPTY], [1, 3, 0, 2, 3, 1]]
    for rows in (first, second, second):
        new = Placement(np.array(rows), EXPERTS, 2)
        engine.move_experts(new)
        after = held(engine)
        assert after.keys() == before.keys()
        for path, array in after.items():
            parsed = ParameterPath.parse(path)
            if not parsed.is_expert:
                np.testing.assert_array_equal(array.view(np.uint8), before[path].view(np.uint8))
                continue
            layers = expert_layers(engine.plan.model, engine.plan.moe)[parsed.layer_block]
            for repeat, layer in enumerate(layers):
                for slot, expert in enumerate(rows[layer]):
                    if expert != EMPTY:
                        was = before[path][repeat, table.slots_of(layer, expert)[0]]
                        found = array[repeat, slot]
                        np.testing.assert_array_equal(found.view(np.uint8), was.view(np.uint8))
        wanted = make_tables(new)[0]._replace(bias_E=engine.tables.bias_E)
        jax.tree.map(np.testing.assert_array_equal, engine.tables, wanted)
        np.testing.assert_array_equal(engine.tables.bias_E, case("biases").bias_LE)


def test_redundant_slots_hold_copies(tmp_path: Path) -> None:
    options: dict[str, Any] = dict(dtype=None, quantize=None, group=64, step=None, fallback=False)
    folder = make_folder("qwen3_moe-plain", tmp_path / "model")
    found = find_model(folder, MeshConfig(expert=2), redundant_slots=1, **options)
    assert found.plan.placement.by_rank.shape[1:] == (2, 5)
    saved = contiguous(LAYERS, EXPERTS, 2)
    assert serving_placement(saved, 2, 1).num_slots == EXPERTS + 2
    assert serving_placement(saved, 2).num_slots == EXPERTS
