"""What decoding over hosts exchanges: by hand for published models, and as the program does."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractMesh, AxisType

from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.config.schema import MeshConfig
from moe_jax.inference.engine import ResidentEngine
from moe_jax.models.layer_pattern import count_moe_layers
from moe_jax.models.serving_plan import ServingPlan
from moe_jax.moe.tables import make_tables
from moe_jax.parallel.collectives import AXES
from moe_jax.parallel.mesh import make_mesh
from moe_jax.placement.table import contiguous
from moe_jax.profiling.network import (
    LINKS,
    MEMORY_BANDWIDTH,
    Exchanges,
    Link,
    decode_exchanges,
    estimate_network,
    step_cost,
)
from tests.support.command import call
from tests.support.small_models import MODELS, VOCAB

# Shapes of published models.
TINYLLAMA = ModelConfig(
    num_layers=22,
    width=2048,
    num_heads=32,
    num_kv_heads=4,
    hidden=5632,
    qk_norm=False,
    tied_embeddings=False,
)
DENSE = MoEConfig(first_dense=22)
QWEN3_30B_A3B = ModelConfig(
    num_layers=48,
    width=2048,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    hidden=6144,
    tied_embeddings=False,
)
EXPERTS = MoEConfig(num_experts=128, top_k=8, hidden=768)


def abstract_plan(model: ModelConfig, moe: MoEConfig, vocab: int, **axes: int) -> ServingPlan:
    sizes = MeshConfig(**axes)
    shape = (sizes.data, sizes.expert, sizes.tensor)
    mesh = AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)
    placement = contiguous(count_moe_layers(model, moe), moe.num_experts, sizes.expert)
    return ServingPlan(model, moe, mesh, placement, vocab_size=vocab)


def test_tinyllama_over_two_hosts() -> None:
    plan = abstract_plan(TINYLLAMA, DENSE, 32_000, tensor=2)
    estimate = estimate_network(plan, 1)
    assert estimate is not None
    # Two sums of 2048 f32 per layer, each two messages of half of it; one gather each of the
    # embedding's row and of half of the logits.
    assert estimate.messages == 22 * 2 * 2 + 1 + 1 == 90
    assert estimate.bytes_sent == 22 * 2 * 8192 + 8192 + 16_000 * 4 == 432_640
    # Everything is halved but the norms, and of the embedding one row is read.
    matrices = 22 * (2048 * 2048 * 2 + 2048 * 256 * 2 + 3 * 2048 * 5632) + 2048 * 32_000
    assert estimate.weight_bytes == 4 * (matrices // 2 + 45 * 2048 + 2048 // 2)
    link = estimate.links[0]
    assert link.link == "1 Gb/s Ethernet"
    exchange = 90 * 170e-6 + 432_640 / (0.949e9 / 8)
    assert link.exchange_seconds == pytest.approx(exchange)
    assert link.tokens_per_second_at_most == pytest.approx(1 / exchange)
    step = exchange + estimate.weight_bytes / MEMORY_BANDWIDTH
    assert link.tokens_per_second == pytest.approx(1 / step)


def test_qwen3_30b_a3b_over_two_workers() -> None:
    plan = abstract_plan(QWEN3_30B_A3B, EXPERTS, 151_936, expert=2)
    estimate = estimate_network(plan, 1)
    assert estimate is not None
    assert estimate.messages == 48 * 2 * 2 + 2
    assert estimate.bytes_sent == 96 * 8192 + 8192 + 151_936 // 2 * 4
    # Half of what a token uses, but the whole of routers and norms.
    attention = 48 * 2048 * 128 * (32 * 2 + 4 * 2)
    experts, head = 48 * 8 * 3 * 2048 * 768, 2048 * 151_936
    whole = 48 * 2048 * 128 + 48 * (2 * 2048 + 2 * 128) + 2048
    assert estimate.weight_bytes == 4 * ((attention + experts + head) // 2 + whole + 2048 // 2)
    # Two sequences share messages, and choose 15.5 experts of a layer in place of 8 on average.
    two = estimate_network(plan, 2)
    assert two is not None and two.messages == estimate.messages
    assert two.bytes_sent == 2 * estimate.bytes_sent
    assert two.weight_bytes - estimate.weight_bytes == 4 * (experts * 15 // 16 + 2048) // 2


def test_rings_of_more_hosts() -> None:
    exchanges = [Exchanges("sum", 4, 8000, 10), Exchanges("gather", 4, 500, 1)]
    # A sum: three turns to add up and three to spread, of a quarter each; a gather: three turns.
    assert step_cost(exchanges) == (63, 10 * 6 * 2000 + 3 * 500)
    assert Link("slow", 1000.0, 0.5).seconds(step_cost(exchanges)) == 63 * 0.5 + 121.5
    assert step_cost([]) == (0, 0)


def test_rows_are_split_over_data() -> None:
    split = estimate_network(abstract_plan(TINYLLAMA, DENSE, 32_000, data=2, tensor=2), 4)
    whole = estimate_network(abstract_plan(TINYLLAMA, DENSE, 32_000, tensor=2), 2)
    assert split is not None and whole is not None
    assert split.rows == whole.rows == 2 and split.bytes_sent == whole.bytes_sent
    for one, other in zip(split.links, whole.links, strict=True):
        assert one.tokens_per_second == pytest.approx(2 * other.tokens_per_second)
    assert estimate_network(abstract_plan(TINYLLAMA, DENSE, 32_000, data=2), 4) is None


SUMS = ("psum", "psum2", "psum_invariant")
GATHERS = ("all_gather", "all_gather_invariant")


def collectives_in(jaxpr: Any, mesh: Any, repeats: int = 1) -> Iterator[tuple[Any, int]]:
    """Each exchange of a program as (kind, ranks, bytes), and how often it runs."""
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name in (*SUMS, *GATHERS):
            axes = params["axes"] if name in SUMS else params["axis_name"]
            axes = (axes,) if isinstance(axes, str) else axes
            ranks = math.prod(mesh.shape[axis] for axis in axes)
            kind = "sum" if name in SUMS else "gather"
            for operand in equation.invars if ranks > 1 else ():
                size = operand.aval.size * operand.aval.dtype.itemsize
                yield (kind, ranks, size), repeats
        elif "all_to_all" in name or name in ("ppermute", "pmax", "reduce_scatter", "psum_scatter"):
            raise AssertionError(name)
        inside = repeats * params["length"] if name == "scan" else repeats
        for inner in jaxprs_in_params(params):
            yield from collectives_in(inner, mesh, inside)


@pytest.mark.parametrize(
    ("name", "axes", "dtype"),
    [
        ("experts", {"data": 2, "expert": 2, "tensor": 2}, "float32"),
        ("experts", {"expert": 4}, "bfloat16"),
        ("biases", {"expert": 4, "tensor": 2}, "float32"),  # 4 does not divide its heads
        ("latent", {"expert": 2, "tensor": 2}, "float32"),
        ("dense", {"tensor": 2}, "float32"),
    ],
)
def test_the_program_exchanges_what_is_counted(name: str, axes: dict[str, int], dtype: str) -> None:
    model_options, moe_options = MODELS[name]
    model = ModelConfig(**dict(width=32, hidden=32) | model_options)
    moe = MoEConfig(**dict(hidden=16, dropless=True) | moe_options)
    config = MeshConfig(**axes)
    placement = contiguous(count_moe_layers(model, moe), moe.num_experts, config.expert)
    mesh = make_mesh(config, jax.devices()[: config.size])
    plan = ServingPlan(model, moe, mesh, placement, vocab_size=VOCAB, dtype=dtype)
    engine = ResidentEngine(plan, plan.abstract_params(), make_tables(placement)[0])
    rows = 3
    program = engine.trace_decode(rows * config.data, 64).jaxpr
    found: Counter[Any] = Counter()
    for exchange, times in collectives_in(program.jaxpr, mesh):
        found[exchange] += times
    counted: Counter[Any] = Counter()
    for kind, ranks, size, times in decode_exchanges(plan, rows):
        counted[kind, ranks, size] += times
    assert found == counted and found


def test_inspect_prints_it_as_an_estimate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32_000,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    inspect = ("inspect", tmp_path, "--dtype", "float32")
    assert call(*inspect, "--mesh", "tensor=2") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "decoding over hosts: estimate" in text
    assert "90 messages in a row and 433 kB sent per step" in text
    assert "of weights at 100 GB/s" in text
    for link in LINKS:
        assert link.name in text
    assert call(*inspect, "--mesh", "tensor=2", "--json") == 0
    network = json.loads(capsys.readouterr().out)["network"]
    assert network["messages"] == 90 and network["bytes_sent"] == 432_640
    assert [link["link"] for link in network["links"]] == [link.name for link in LINKS]
    assert call(*inspect, "--json") == 0
    assert json.loads(capsys.readouterr().out)["network"] is None
