from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax.parallel.sharding import RULES, spec
from tests.support.tiny_programs import EXPERTS, make_program


def test_specs_follow_the_table():
    assert spec(("vocab", "width")) == P(("tensor",), ("data", "expert"))
    assert spec(("slots", "slot_width", "gate_up", "hidden"), leading=1) == P(
        None, ("expert",), ("data",), None, ("tensor",)
    )
    assert spec(("norm",)) == P(None)


@pytest.mark.parametrize(
    ("axes", "axis"),
    [
        (("vocab", "heads"), "tensor"),
        (("slots", "width"), "expert"),
        (("width", "slot_width"), "data"),
    ],
)
def test_two_dimensions_on_one_mesh_axis_are_refused(axes, axis):
    with pytest.raises(
        ValueError, match=f"{axes[1]!r} and {axes[0]!r} both claim mesh axis {axis!r}"
    ):
        spec(axes)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="'depth' has no rule"):
        spec(("depth", "width"))


def leaves(tree, part: str) -> list[jax.Array]:
    """The arrays of a tree that belong to experts, to routers, to norms, or else to the dense
    part.
    """

    def part_of(path) -> str:
        names = {getattr(entry, "key", None) for entry in path}
        return next(
            (
                name
                for name, key in (("experts", "experts"), ("router", "router"), ("norms", "scale"))
                if key in names
            ),
            "dense",
        )

    return [a for path, a in jax.tree.leaves_with_path(tree) if part_of(path) == part]


def bytes_on(device: jax.Device, arrays: list[jax.Array]) -> int:
    return sum(
        shard.data.nbytes
        for a in arrays
        for shard in a.addressable_shards
        if shard.device == device
    )


@pytest.mark.parametrize(
    ("data", "expert", "tensor"), [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2)]
)
def test_a_device_holds_its_share_of_experts_and_of_their_moments(data, expert, tensor):
    """Experts are divided over `expert`, and each slot's matrices over `data` and `tensor`; so is
    every dense matrix.
    """
    state = make_program(data, expert, tensor, model=dict(tied_embeddings=False)).init(0)
    total = 2 * EXPERTS * 3 * 16 * 8 * 4  # layers, experts, three matrices of 16 x 8, f32
    experts = leaves(state.params, "experts")
    assert sum(a.nbytes for a in experts) == total
    moments = leaves(state.opt_state, "experts")
    assert sum(a.nbytes for a in moments) == 2 * total  # AdamW's two
    dense, routers = leaves(state.params, "dense"), leaves(state.params, "router")
    devices = data * expert * tensor
    for device in jax.devices()[:devices]:
        assert bytes_on(device, experts) == total // devices
        assert bytes_on(device, moments) == 2 * total // devices
        assert bytes_on(device, dense) == sum(a.nbytes for a in dense) // devices
        assert bytes_on(device, routers) == sum(a.nbytes for a in routers) // (
            data * expert
        )  # the same on all of `tensor`


def test_moments_are_sharded_like_their_parameters():
    program = make_program(2, 2, 2)
    state = program.init(0)
    shardings = {a.shape: a.sharding.spec for a in jax.tree.leaves(state.params)}
    moments = [a for a in jax.tree.leaves(state.opt_state) if a.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(state.params))
    for moment in moments:
        assert moment.sharding.spec == shardings[moment.shape]


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_other_optimizers_have_sharded_moments_too(name):
    program = make_program(
        2, 2, 2, optimizer=dict(name=name), model=dict(width=128), moe=dict(hidden=128)
    )
    state = program.init(0)
    shapes = {a.shape: a.sharding for a in jax.tree.leaves(state.params)}
    like = [a for a in jax.tree.leaves(state.opt_state) if a.shape in shapes]
    assert like
    for moment in like:
        assert moment.sharding == shapes[moment.shape]


def test_empty_slots_hold_zeros_and_initial_experts_do_not_depend_on_the_mesh():
    reference = make_program(1, 1, moe=dict(num_experts=6))
    spread = make_program(1, 4, moe=dict(num_experts=6))
    assert (reference.placement.empty_slots, spread.placement.empty_slots) == (0, 2)
    one, four = (leaves(p.init(5).params, "experts") for p in (reference, spread))
    for a, b in zip(one, four, strict=True):
        assert (a.shape[1], b.shape[1]) == (6, 8)
        np.testing.assert_array_equal(a, b[:, :6])
        assert not np.any(b[:, 6:])


def test_every_parameter_starts_the_same_on_every_mesh():
    one, eight = (make_program(*mesh).init(3).params for mesh in ((1, 1, 1), (2, 2, 2)))
    # Not to the last bit: programs for shards of another size may be other machine code.
    jax.tree.map(partial(np.testing.assert_array_max_ulp, maxulp=4), one, eight)


def test_every_rule_names_mesh_axes():
    assert {axis for axes in RULES.values() for axis in axes} == {"data", "expert", "tensor"}
