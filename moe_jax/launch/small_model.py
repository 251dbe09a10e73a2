"""A model of two layers, one of them with experts, whose logits are known.

`moe-jax doctor` compares with them. Weights come from a formula, so that they need no file.
`RECORDED` was computed on a CPU in f32, by the programs for the CPU
(tests/launch/test_metal_probes.py computes it again).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.config.schema import MeshConfig
from moe_jax.inference.engine import ResidentEngine
from moe_jax.inference.read_weights import read_params, serving_tables
from moe_jax.models.batch import NewTokens
from moe_jax.models.layer_pattern import count_moe_layers
from moe_jax.models.serving_plan import ServingPlan
from moe_jax.parallel.mesh import make_mesh
from moe_jax.placement.table import contiguous

PROMPT, LATER = (3, 17, 4, 9, 30, 1, 22), (11, 5)
VOCABULARY, KEPT_LOGITS = 32, 6  # logits kept of each step: the first
RECORDED: tuple[tuple[float, ...], ...] = (
    (0.249757, 1.318052, 1.692659, 0.356982, -1.868962, 1.104699),
    (-1.598880, 1.967620, -0.478202, 0.953136, -1.083889, 0.265707),
    (-0.615252, 0.180352, 0.196374, 2.135383, -1.286352, 0.019459),
)


def small_model_logits() -> np.ndarray:
    """Logits [steps, KEPT_LOGITS] after the prompt and after each later token."""
    engine = _engine()
    logits, cache = engine.prefill(engine.layout.new(1, 256), _new(PROMPT, 0))
    steps = [logits]
    for number, token in enumerate(LATER):
        logits, cache = engine.decode(cache, _new((token,), len(PROMPT) + number))
        steps.append(logits)
    return np.concatenate([np.asarray(one)[:, :KEPT_LOGITS] for one in steps])


def _engine() -> ResidentEngine:
    model = ModelConfig(num_layers=2, width=32, num_heads=4, num_kv_heads=2, hidden=48)
    moe = MoEConfig(num_experts=4, top_k=2, hidden=24, first_dense=1, dropless=True)
    placement = contiguous(count_moe_layers(model, moe), moe.num_experts, 1)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    plan = ServingPlan(model, moe, mesh, placement, vocab_size=VOCABULARY)

    def read(path: str, index: tuple[Any, ...]) -> np.ndarray:
        shape = plan.weights[path].shape
        number = list(plan.weights).index(path)
        place = np.arange(math.prod(shape), dtype=np.float64)
        values = np.sin(1.7 * place + 0.31 * place**1.5 + number)
        norm = path.endswith("scale")
        scaled = (
            1 + 0.1 * values if norm else values * 1.4 * shape[-2 if len(shape) > 1 else 0] ** -0.5
        )
        return scaled.astype(np.float32).reshape(shape)[np.ix_(*map(_places, index, shape))]

    return ResidentEngine(plan, read_params(plan, read), serving_tables(plan, None))


def _places(part: Any, size: int) -> np.ndarray:
    return np.arange(size)[part]


def _new(tokens: tuple[int, ...], start: int) -> NewTokens:
    return NewTokens.whole_rows([tokens])._replace(start=jnp.full(1, start, jnp.int32))
