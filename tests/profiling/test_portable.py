"""Programs against the tables of the Metal plug-ins: what a plug-in lacks is seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_jax.profiling.portable import (
    PluginTable,
    as_sent,
    count_ops,
    lower_for,
    missing,
    read_plugin_table,
    relied_on_drops,
)
from tests.support.metal_plugins import TABLES, plugin

X = jnp.ones((4, 4))


@pytest.fixture(scope="module")
def mps() -> Iterator[PluginTable]:
    with plugin("jax-mps-0.10.11") as table:
        yield table


def lacks(table: PluginTable, function: Callable[..., Any], *arguments: Any) -> list[str]:
    lowered = lower_for(jax.jit(function).trace(*arguments), table.platform)
    return missing(as_sent(lowered, table), table)


def over_one_device(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    mesh = Mesh(jax.devices()[:1], ("x",))
    return jax.shard_map(function, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)


def softplus_sum(x: jax.Array) -> jax.Array:
    return lax.reduce(x, -jnp.inf, jnp.logaddexp, (0,))


def multiply_bf16(x: jax.Array) -> jax.Array:
    half = x.astype(jnp.bfloat16)
    return jnp.matmul(half, half, preferred_element_type=jnp.float32)


PLANTED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "operation": (
        over_one_device(lambda x: lax.all_gather(x, "x")),
        "stablehlo.all_gather: not registered",
    ),
    "collective": (
        over_one_device(lambda x: lax.psum(x, "x")),
        "stablehlo.all_reduce: a collective, of one device",
    ),
    "branch": (
        lambda x: lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x),
        "stablehlo.case: waits for the host",
    ),
    "custom call": (
        lambda x: jax.ffi.ffi_call("elsewhere", jax.ShapeDtypeStruct(x.shape, x.dtype))(x),
        "stablehlo.custom_call @elsewhere: unknown target",
    ),
    "type": (lambda x: x.astype(jnp.int4).astype(jnp.float32), "stablehlo.convert: type i4"),
    "type of a constant": (
        lambda x: (x, jnp.ones(2, jnp.float8_e5m2)),
        "stablehlo.constant: type f8E5M2",
    ),
    "keys of a sort": (
        lambda x: lax.sort((x, -x), dimension=0, num_keys=2),
        "stablehlo.sort: by 2 keys (sorts by the first key alone)",
    ),
    "body of a reduction": (softplus_sum, "stablehlo.reduce: combines by "),
    "type of a product": (multiply_bf16, "stablehlo.dot_general: bf16 to f32 ("),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_what_is_planted_is_found(kind: str, mps: PluginTable) -> None:
    function, said = PLANTED[kind]
    found = lacks(mps, function, X)
    assert any(line.startswith(said) for line in found), found


def test_scatters_that_may_drop_are_found(mps: PluginTable) -> None:
    def scattered(mode: str | None) -> Callable[[Any], Any]:
        return lambda x: lax.map(lambda row: row.at[jnp.argmax(row)].set(0, mode=mode), x)

    assert relied_on_drops(jax.jit(scattered(None)).trace(X), mps) == [
        "stablehlo.scatter: scatter may have to drop indices (writes somewhere what is out of "
        "bounds)"
    ]
    for mode in ("clip", "promise_in_bounds"):
        assert relied_on_drops(jax.jit(scattered(mode)).trace(X), mps) == []
    repeated = jax.jit(lambda x: jnp.repeat(x, jnp.arange(4), axis=0, total_repeat_length=6))
    assert relied_on_drops(repeated.trace(X), mps)
    dropless = dataclasses.replace(mps, limits=())
    assert relied_on_drops(repeated.trace(X), dropless) == []


def test_what_the_plugin_can_do_passes(mps: PluginTable) -> None:
    def program(x: jax.Array) -> Any:
        half = x.astype(jnp.bfloat16)
        chosen = lax.top_k(x, 2), jnp.argmax(x, axis=1), lax.sort((x, -x), num_keys=1)
        counted = jnp.zeros(4, jnp.int32).at[jnp.argmin(x, axis=1)].add(1)
        return half @ half, chosen, counted, jnp.all(x > 0), jnp.cumsum(x, axis=0)

    assert lacks(mps, program, X) == []


def test_a_program_that_an_old_release_cannot_read_is_refused(mps: PluginTable) -> None:
    lowered = lower_for(jax.jit(lambda x: lax.top_k(x, 2)).trace(X), mps.platform)
    with pytest.raises(ValueError, match=r"^it cannot be written in StableHLO 0\.17\.0"):
        as_sent(lowered, dataclasses.replace(mps, newest="0.17.0"))


def test_operations_are_counted_as_often_as_they_run(mps: PluginTable) -> None:
    def scanned(length: int) -> Callable[[Any], Any]:
        return lambda x: jnp.sin(lax.scan(lambda c, _: (c * 2, None), x, None, length)[0])

    def count(length: int) -> tuple[int, int]:
        lowered = lower_for(jax.jit(scanned(length)).trace(X), mps.platform)
        return count_ops(as_sent(lowered, mps))

    (total, inside), (_, twice) = count(3), count(6)
    assert twice == 2 * inside > 0
    assert total - inside == 1  # the sine


def test_a_table_says_which_jax_it_takes() -> None:
    old, new = (read_plugin_table(TABLES / f"jax-mps-{x}.json") for x in ("0.10.11", "0.11.1"))
    assert old.takes("0.10.1") and not old.takes("0.11.2")
    assert new.takes("0.11.2") and not new.takes("0.10.1")


def test_a_table_without_operations_is_refused() -> None:
    with pytest.raises(ValueError, match="lists no operations"):
        read_plugin_table(TABLES / "metal-pjrt-plugin-0.0.2.json")
