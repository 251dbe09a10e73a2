"""The mesh of a TPU's torus, without a TPU."""

from __future__ import annotations

import itertools
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from moe_jax.config.schema import MeshConfig
from moe_jax.parallel.collectives import AXES
from moe_jax.parallel.mesh import make_mesh


@pytest.fixture
def cube() -> list[Mock]:
    """Stands for 4 x 4 x 4 chips of a v5p, in the order that JAX lists them."""
    kind = {"platform": "tpu", "device_kind": "TPU v5", "process_index": 0, "core_on_chip": 0}
    at = [coords[::-1] for coords in itertools.product(range(4), repeat=3)]
    return [Mock(jax.Device, id=n, coords=coords, **kind) for n, coords in enumerate(at)]


def grid_of(cube: list[Mock], **axes: int) -> np.ndarray:
    """The coordinates of each place of the mesh, [data, expert, tensor, 3]."""
    devices = make_mesh(MeshConfig(**axes), cube).devices
    return np.array([chip.coords for chip in devices.flat]).reshape(*devices.shape, 3)


def test_two_axes_may_share_a_dim_of_the_torus(cube):
    at = grid_of(cube, data=8, expert=8)
    assert len(np.unique(at.reshape(-1, 3), axis=0)) == 64
    # The ranks of a row are chips of one plane, a line and its neighbour.
    for row in at[:, :, 0]:
        spread = sorted(len(np.unique(row[:, dim])) for dim in range(3))
        assert spread == [1, 2, 4]


def test_axes_that_fill_whole_dims_lie_as_jax_lays_them(cube):
    theirs = jax.make_mesh((4, 16, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=cube)
    assert (make_mesh(MeshConfig(data=4, expert=16), cube).devices == theirs.devices).all()
