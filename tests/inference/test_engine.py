"""The engine on one device and on many against the training program on one: see small_models.py."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.config.schema import MeshConfig
from moe_jax.errors import UserError
from moe_jax.inference.engine import ResidentEngine
from moe_jax.inference.session import LoadedModel
from moe_jax.models.layer_pattern import count_moe_layers
from moe_jax.models.paths import nested
from moe_jax.models.serving_plan import ServingPlan
from moe_jax.moe.tables import make_tables
from moe_jax.ops.quantized import Kind, PackedWeight, dequantize
from moe_jax.parallel.mesh import make_mesh
from moe_jax.placement.table import Placement, contiguous
from moe_jax.profiling import hlo
from moe_jax.runtime import platform
from tests.support.slow import slow_unless
from tests.support.small_models import (
    LENGTH,
    PROMPTS,
    VOCAB,
    Case,
    assert_same,
    case,
    load,
    make_plan,
    new_tokens,
)
from tests.support.tiny_programs import lay_out

PLACES, WIDTH = 16, 8


def write(case: Case, loaded: LoadedModel) -> np.ndarray:
    """Logits [2, LENGTH - 4, V] from each row's prompt on: both read at once, then a token at a
    time from the cache.
    """
    rows = [list(text[:count]) for text, count in zip(case.texts, PROMPTS, strict=True)]
    engine = loaded.engine
    logits, cache = engine.prefill(engine.layout.new(2, PLACES), new_tokens(rows, [0, 0], WIDTH))
    found, start = [logits], np.array(PROMPTS)
    for _ in range(LENGTH - max(PROMPTS)):
        tokens = np.take_along_axis(case.texts, start[:, None], axis=1)
        logits, cache = engine.decode(cache, new_tokens(list(tokens), start, 1))
        found.append(logits)
        start = start + 1
    return np.stack(found, axis=1)


def wanted(case: Case) -> np.ndarray:
    """What `write` should give."""
    count = LENGTH - max(PROMPTS) + 1
    return np.stack(
        [
            row[prompt - 1 : prompt - 1 + count]
            for row, prompt in zip(case.logits, PROMPTS, strict=True)
        ]
    )


# Each axis, and each model.
MESHES = [
    ("experts", {}),
    ("experts", {"expert": 8}),
    ("biases", {"expert": 2, "tensor": 2}),
    ("latent", {"expert": 2, "tensor": 2}),
    ("dense", {"data": 2, "tensor": 2}),
]


@pytest.mark.parametrize(
    ("name", "mesh"),
    slow_unless(
        MESHES.__contains__,
        [
            ("experts", {}),
            ("experts", {"expert": 2}),
            ("experts", {"expert": 4}),  # empty slots; heads and widths are split over it too
            ("experts", {"expert": 8}),  # ranks without an expert; two share a key head
            ("experts", {"tensor": 4}),
            ("experts", {"expert": 2, "tensor": 2}),
            ("experts", {"data": 2, "expert": 2}),
            ("biases", {}),
            ("biases", {"expert": 4}),
            ("biases", {"tensor": 2}),
            ("biases", {"expert": 2, "tensor": 2}),  # two devices share a key head
            ("latent", {}),
            ("latent", {"expert": 2, "tensor": 2}),
            ("dense", {"expert": 2, "tensor": 2}),
            ("dense", {"data": 2, "tensor": 2}),
        ],
    ),
    ids=lambda value: (
        value
        if isinstance(value, str)
        else "-".join(f"{axis}{size}" for axis, size in value.items()) or "one"
    ),
)
def test_prefill_and_cached_decoding_equal_the_training_program(
    name: str, mesh: dict[str, int]
) -> None:
    assert_same(write(case(name), load(case(name), mesh)), wanted(case(name)))


@pytest.fixture(scope="module")
def single() -> LoadedModel:
    return load(case("experts"), {})


@pytest.fixture(scope="module")
def square() -> LoadedModel:
    return load(case("experts"), {"expert": 2, "tensor": 2})


@pytest.mark.parametrize("which", ["replicas", "scattered"])
def test_experts_anywhere(which: str) -> None:
    """More slots than experts, and tables that differ from layer to layer."""
    data = case("experts")
    layers, experts = count_moe_layers(data.model, data.moe), data.moe.num_experts
    if which == "replicas":
        placement = contiguous(layers, experts, 2, redundant_slots=1)
    else:
        rng = np.random.default_rng(2)
        half = experts // 2
        drawn = [rng.permutation(experts) for _ in range(layers)]
        rows = [[-1, *order[:half], order[-1], order[0], *order[half:], -1] for order in drawn]
        placement = Placement(np.array(rows), experts, 2)
    assert_same(write(data, load(data, {"expert": 2}, placement=placement)), wanted(data))


def test_logits_everywhere_and_the_score(square: LoadedModel) -> None:
    data = case("experts")
    new = new_tokens(list(data.texts), [0, 0], LENGTH)
    assert_same(np.asarray(square.engine.all_logits(new)), data.logits)
    targets, mask = np.roll(data.texts, -1, axis=1), np.ones_like(data.texts, np.float32)
    mask[:, -1], mask[0, 2:5] = 0, 0
    nats, count = square.engine.score(data.texts, targets, mask)
    likelihood = np.take_along_axis(
        np.asarray(jax.nn.log_softmax(data.logits.astype(np.float64))), targets[..., None], axis=-1
    )
    assert count == mask.sum() == 15
    np.testing.assert_allclose(nats, -(likelihood[..., 0] * mask).sum(), rtol=1e-5)


def test_the_rest_of_a_prompt_in_a_larger_cache_and_again(single: LoadedModel) -> None:
    """Several tokens behind others, as many as each row likes; then a row goes back and takes
    another way.
    """
    data, engine = case("experts"), single.engine
    a, b = (list(text) for text in data.texts)
    _, cache = engine.prefill(engine.layout.new(2, 8), new_tokens([a[:5], b[:3]], [0, 0], WIDTH))
    cache = engine.layout.grow(cache, PLACES)
    logits, cache = engine.decode(cache, new_tokens([a[5:6], b[3:9]], [5, 3], 6))
    assert_same(logits, np.stack([data.logits[0, 5], data.logits[1, 8]]))
    other = [(a[2] + 1) % VOCAB, 7, 9]
    _, cache = engine.decode(cache, new_tokens([other, b[9:]], [2, 9], 6))
    logits, _ = engine.decode(cache, new_tokens([a[2:6], b[4:8]], [2, 4], 6))
    assert_same(logits, np.stack([data.logits[0, 5], data.logits[1, 7]]))


@pytest.mark.parametrize("name", ["experts", "latent"])
def test_keys_one_after_another_in_a_larger_cache(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of dims that TPUs have; key heads are shared by devices."""
    record = dataclasses.replace(platform.default_platform(), places_last=False, packed_tile=8)
    monkeypatch.setitem(platform.PLATFORMS, "cpu", record)
    data = case(name)
    engine = load(data, {"expert": 8} if name == "experts" else {}).engine
    a, b = (list(text) for text in data.texts)
    _, cache = engine.prefill(engine.layout.new(2, 8), new_tokens([a[:5], b[:3]], [0, 0], WIDTH))
    cache = engine.layout.grow(cache, PLACES)
    keys = cache[0][0].keys
    assert keys.shape[3] == PLACES and keys.shape[2] == {"experts": 8, "latent": 1}[name]
    logits, cache = engine.decode(cache, new_tokens([a[5:6], b[3:9]], [5, 3], 6))
    assert_same(logits, np.stack([data.logits[0, 5], data.logits[1, 8]]))
    if name == "experts":
        whole = engine.all_logits(new_tokens([a, b], [0, 0], LENGTH))
        assert_same(np.asarray(whole), data.logits)


def test_rows_do_not_see_each_other(single: LoadedModel) -> None:
    """Bitwise, in both programs: only the shapes that are compiled count, not who else is there."""
    data, engine = case("experts"), single.engine

    def outcome(other: list[int]) -> list[np.ndarray]:
        prompts = new_tokens([data.texts[0][:5], other], [0, 0], WIDTH)
        logits, cache = engine.prefill(engine.layout.new(2, PLACES), prompts)
        step = new_tokens([data.texts[0][5:6], other[:1]], [5, len(other)], 1)
        after, _ = engine.decode(cache, step)
        return [np.asarray(logits[0]), np.asarray(after[0])]

    for found, again in zip(outcome([1, 2, 3]), outcome([9, 8, 7, 6, 5, 4, 3]), strict=True):
        np.testing.assert_array_equal(found, again)


@pytest.mark.parametrize("kind", ["float", "int8", "int4"])
@pytest.mark.parametrize(
    "mesh", slow_unless(bool, [{}, {"expert": 2, "tensor": 2}]), ids=["one", "four"]
)
def test_weights_read_in_parts_are_those_of_training_packed(
    kind: str, mesh: dict[str, int]
) -> None:
    """Bitwise, and held where the engine says. The latent model has every sort of leaf but
    biases.
    """
    data = case("latent")
    loaded = load(data, mesh, quantization=kind, group=4)
    engine = loaded.engine
    leaves = jax.tree.map(np.asarray, nested(data.leaves))
    whole = jax.tree.map(jnp.asarray, lay_out(leaves, data.model, data.moe, engine.plan.placement))
    for (path, found), packed in zip(
        jax.tree.leaves_with_path(engine.params),
        jax.tree.leaves(engine.plan.pack(whole)),
        strict=True,
    ):
        assert found.dtype == packed.dtype and found.sharding.is_equivalent_to(
            packed.sharding, found.ndim
        ), path
        np.testing.assert_array_equal(
            np.asarray(found), np.asarray(packed), err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.parametrize(
    ("name", "kind"),
    [("experts", "int8"), pytest.param("latent", "int4", marks=pytest.mark.slow)],
)
def test_quantised_weights_compute_as_what_they_stand_for(name: str, kind: str) -> None:
    """One device's with the weights dequantised before, and four devices' as one's."""
    data = case(name)
    small = load(data, {}, quantization=kind, group=4)
    assert sum(a.nbytes for a in jax.tree.leaves(small.engine.params)) < 0.6 * sum(
        leaf.nbytes for leaf in data.leaves.values()
    )

    def is_matrix(value):
        return isinstance(value, PackedWeight)

    def floats(tree):
        return jax.tree.map(
            lambda m: PackedWeight(dequantize(m, jnp.float32)) if is_matrix(m) else m,
            tree,
            is_leaf=is_matrix,
        )

    plain = ResidentEngine(
        make_plan(data, {}), jax.jit(floats)(small.engine.params), small.engine.tables
    )
    stood_for = write(data, dataclasses.replace(small, engine=plain))
    assert_same(write(data, small), stood_for)
    assert_same(
        write(data, load(data, {"expert": 2, "tensor": 2}, quantization=kind, group=4)), stood_for
    )
    off = np.abs(stood_for - wanted(data)).max() / np.abs(wanted(data)).max()
    assert 1e-4 < off < 0.7  # much where rounding changes a choice of experts


def test_meshes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(
        UserError, match="tensor=8 does not divide the model's 4 key and value heads"
    ):
        make_plan(case("experts"), {"tensor": 8})
    with pytest.raises(UserError, match="tensor=8 does not divide the model's 4 query heads"):
        make_plan(case("biases"), {"tensor": 8})
    odd = case("experts")._replace(moe=dataclasses.replace(case("experts").moe, hidden=15))
    with pytest.raises(
        UserError, match="tensor=2 does not divide the model's 15 expert hidden width"
    ):
        make_plan(odd, {"tensor": 2})


def test_experts_that_are_chosen_for_whole_sequences_cannot_generate() -> None:
    whole = case("experts")
    whole = whole._replace(moe=dataclasses.replace(whole.moe, route_by="sequence"))
    with pytest.raises(UserError, match=r"moe\.route_by=sequence .* moe\.route_by=token"):
        make_plan(whole, {})


def test_int4_groups_must_divide_what_each_device_has_of_the_inputs() -> None:
    """4 heads of 8: 32 inputs of `out`, 8 on each of four devices."""
    make_plan(case("dense"), {"tensor": 2}, quantization="int4", group=16)
    with pytest.raises(
        UserError,
        match=r"groups of 16, .* the inputs of attention out \(32, of which each device has 8\)",
    ):
        make_plan(case("dense"), {"tensor": 4}, quantization="int4", group=16)


# What the compiled programs hold

LAYERS = 22


def deep(mesh: dict[str, int], *, experts: bool = False, dtype: str = "float32") -> ResidentEngine:
    """TinyLlama with other widths and no weights, or the same with experts in every layer."""
    model = ModelConfig(
        num_layers=LAYERS,
        width=64,
        num_heads=32,
        num_kv_heads=4,
        head_dim=2,
        hidden=64,
        qk_norm=False,
        tied_embeddings=False,
    )
    moe = MoEConfig(
        num_experts=4,
        hidden=16,
        dropless=True,
        first_dense=0 if experts else LAYERS,
        shared_experts=int(experts),
    )
    config = MeshConfig(**mesh)
    placement = contiguous(count_moe_layers(model, moe), 4, config.expert)
    mesh_of_some = make_mesh(config, jax.devices()[: config.size])
    plan = ServingPlan(model, moe, mesh_of_some, placement, vocab_size=VOCAB, dtype=dtype)
    return ResidentEngine(plan, plan.abstract_params(), make_tables(placement)[0])


def lowered(engine: ResidentEngine, program: str) -> jax.stages.Lowered:
    """A decoding step, or logits everywhere."""
    if program == "logits":
        return engine.lower_all_logits(2, 8)
    return engine.lower_decode(2, PLACES)


def moved(program: jax.stages.Lowered) -> dict[str, int]:
    """How often each collective runs that any other device takes part in."""
    found: dict[str, int] = {}
    for collective in hlo.collectives(program.compile().as_text()):
        assert not collective.dynamic
        if collective.group > 1:
            found[collective.op] = found.get(collective.op, 0) + collective.times
    return found


@pytest.mark.parametrize("program", ["decode", "logits"])
@pytest.mark.parametrize(
    ("mesh", "experts"), [({"tensor": 2}, False), ({"expert": 2}, True)], ids=["tensor", "expert"]
)
def test_two_sums_a_layer_and_a_gather_at_either_end(
    mesh: dict[str, int], experts: bool, program: str
) -> None:
    assert moved(lowered(deep(mesh, experts=experts), program)) == {
        "all-reduce": 2 * LAYERS,
        "all-gather": 2,
    }


@pytest.mark.parametrize("kind", ["float", "int8", "int4"])
def test_decoding_copies_neither_weights_nor_cache(kind: Kind) -> None:
    """Nor a tenth of them: what a step of the CPU's program needs beside its arguments."""
    model = ModelConfig(num_layers=4, width=64, num_heads=4, num_kv_heads=2, head_dim=16)
    moe = MoEConfig(num_experts=16, hidden=32, top_k=2, dropless=True)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    placement = contiguous(4, 16, 1)
    plan = ServingPlan(model, moe, mesh, placement, vocab_size=VOCAB, quantization=kind, group=32)
    engine = ResidentEngine(plan, plan.abstract_params(), make_tables(placement)[0])
    memory = engine.lower_decode(4, 1024).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.1 * memory.argument_size_in_bytes


def test_one_device_talks_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """No collective, not even with itself, and no call of the host; the cache's memory is given
    back where that is known to work.
    """
    engine = deep({}, experts=True)
    step = lowered(engine, "decode")
    text, cache = step.as_text(), jax.tree.leaves(engine.layout.abstract(2, PLACES))
    assert not [
        name
        for name in ("all_reduce", "all_gather", "all_to_all", "collective_permute", "callback")
        if name in text
    ]
    assert hlo.collectives(step.compile().as_text()) == []
    assert text.count("tf.aliasing_output") + text.count("jax.buffer_donor") == len(cache)
    record = dataclasses.replace(platform.default_platform(), donates=False)
    monkeypatch.setitem(platform.PLATFORMS, "cpu", record)
    again = lowered(deep({}, experts=True), "decode").as_text()
    assert "tf.aliasing_output" not in again and "jax.buffer_donor" not in again


def keep_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if XLA:CPU could cut bf16 arrays: programs take them as they are."""
    record = dataclasses.replace(platform.default_platform(), cuts_halves=True)
    monkeypatch.setitem(platform.PLATFORMS, "cpu", record)


def converted_whole(engine: ResidentEngine) -> set[str]:
    """The bf16 arrays of several layers, and the head, that a step has in f32 at once."""
    held = (engine.params, engine.layout.abstract(1, 256))
    shapes = {leaf.shape for leaf in jax.tree.leaves(held) if leaf.dtype.itemsize == 2}
    banks = {(shape[0] * shape[1], *shape[2:]) for shape in shapes if len(shape) > 3}
    text = engine.lower_decode(1, 256).compile().as_text()
    return {
        name
        for shape in shapes | banks
        if (name := f"f32[{','.join(map(str, shape))}]") in text and len(shape) > 1
    }


def test_a_step_in_bf16_converts_no_array_of_several_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor the head, nor the cache: only what it uses of them."""
    assert converted_whole(deep({}, experts=True, dtype="bfloat16")) == set()
    keep_halves(monkeypatch)  # or the search would find nothing anywhere
    assert len(converted_whole(deep({}, experts=True, dtype="bfloat16"))) > 3


@pytest.mark.parametrize(
    ("name", "mesh", "off"),
    slow_unless(
        lambda case: case[0] == "experts",
        [
            ("experts", {}, 0.02),
            ("biases", {"expert": 2, "tensor": 2}, 0.4),  # rounding changes a choice of experts
            ("latent", {}, 0.08),
        ],
    ),
)
def test_bits_compute_as_the_bf16_that_they_stand_for(
    name: str, mesh: dict[str, int], off: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And near f32."""
    data = case(name)
    found, exact = write(data, load(data, mesh, dtype="bfloat16")), wanted(data)
    assert np.abs(found - exact).max() < off * np.abs(exact).max()
    keep_halves(monkeypatch)
    as_it_is = write(data, load(data, mesh, dtype="bfloat16"))
    # XLA may keep more bits than bf16 has between two operations.
    np.testing.assert_allclose(found, as_it_is, atol=0.01 * np.abs(exact).max())
