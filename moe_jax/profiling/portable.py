"""Whether a program that was lowered for another platform can run there: its operations, types and
attributes against the table of what that platform's plug-in registers.

    table = read_plugin_table(Path("scripts/plugins/jax-mps-0.10.11.json"))
    portable = as_sent(lowered, table)            # StableHLO as the plug-in would read it
    missing(portable, table)                      # ["stablehlo.all_to_all: not registered"]
    count_ops(portable)                           # operations that a run starts, about

A plug-in is sent a portable artifact: StableHLO in the newest version that both sides know, in
which CHLO is written out. The tables come from scripts/plugin_ops.py.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.extend import mlir
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.lax import GatherScatterMode
from packaging.specifiers import SpecifierSet

NOT_STARTED = ("stablehlo.constant", "stablehlo.return", "func.return")
"""Operations that start nothing on a device."""
DROPS = "drops"  # the rule of a plug-in that does not drop what is scattered out of bounds
UNWANTED = {
    **dict.fromkeys(
        (
            *("stablehlo.all_reduce", "stablehlo.all_gather", "stablehlo.all_to_all"),
            *("stablehlo.reduce_scatter", "stablehlo.collective_permute"),
            "stablehlo.collective_broadcast",
        ),
        "a collective, of one device",
    ),
    **dict.fromkeys(("stablehlo.case", "stablehlo.if"), "waits for the host"),
}
"""What some plug-ins run and none should be asked to: no program for one device needs it."""


class Limit(NamedTuple):
    """What a plug-in cannot do though it registers the operation."""

    op: str
    rule: str
    what: str
    most: int
    allowed: tuple[str, ...]


@dataclass(frozen=True)
class PluginTable:
    """What a release of a plug-in can run."""

    name: str  # plug-in and version
    platform: str
    jax: str  # releases of jax that it asks for
    newest: str  # StableHLO
    shardy: bool  # programs come with Shardy's annotations
    ops: frozenset[str]
    custom_calls: frozenset[str]
    dtypes: frozenset[str]
    limits: tuple[Limit, ...]

    def takes(self, version: str) -> bool:
        """Whether the plug-in asks for this release of jax."""
        return SpecifierSet(self.jax).contains(version, prereleases=True)


def read_plugin_table(path: Path) -> PluginTable:
    """A table that scripts/plugin_ops.py wrote. Raises ValueError for one without operations."""
    table = json.loads(path.read_text(encoding="utf-8"))
    if table["ops"] is None:
        raise ValueError(f"{path} lists no operations: {table['obtained']['ops']}")
    limits = [
        Limit(x["op"], x["rule"], x["what"], x.get("most", 0), tuple(x.get("allowed", ())))
        for x in table["limits"]
    ]
    return PluginTable(
        f"{table['plugin']} {table['version']}",
        table["platform"],
        table["requires"]["jax"],
        table["stablehlo"]["newest"],
        table["shardy"],
        frozenset(table["ops"]),
        frozenset(table["custom_calls"]),
        frozenset(table["dtypes"]),
        tuple(limits),
    )


def lower_for(traced: jax.stages.Traced, platform: str) -> jax.stages.Lowered:
    """A program lowered for a platform whose back end need not be here, only be registered.

    JAX must have the plug-in's choice of partitioner (`PluginTable.shardy`).
    """
    return traced.lower(lowering_platforms=(platform,))


def as_sent(lowered: jax.stages.Lowered, table: PluginTable) -> ir.Module:
    """The program as the plug-in reads it: through a portable artifact of a version that both
    sides know. Raises ValueError where it cannot be written in that version.
    """
    version = min(table.newest, stablehlo.get_current_version(), key=_numbers)
    module = lowered.compiler_ir("stablehlo")
    assert module is not None
    try:
        artifact = mlir.serialize_portable_artifact(module, version, table.shardy)
    except Exception as error:  # jaxlib raises what XLA reports, of several types
        raise ValueError(f"it cannot be written in StableHLO {version}: {error}") from error
    with module.context:
        return mlir.deserialize_portable_artifact(artifact)


def missing(module: ir.Module, table: PluginTable) -> list[str]:
    """What the plug-in lacks to run a program, a line for each kind of lack, sorted."""
    found: set[str] = set()

    def visit(op: ir.Operation) -> ir.WalkResult:
        found.update(_lacks(op.operation, table))
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return sorted(found)


def _lacks(op: ir.Operation, table: PluginTable) -> Iterator[str]:
    if op.name not in table.ops:
        yield f"{op.name}: not registered"
    elif op.name in UNWANTED:
        yield f"{op.name}: {UNWANTED[op.name]}"
    if op.name == "stablehlo.custom_call":
        target = ir.StringAttr(op.attributes["call_target_name"]).value
        if target not in table.custom_calls:
            yield f"{op.name} @{target}: unknown target"
    for kind in _element_types(op):
        if kind not in table.dtypes:
            yield f"{op.name}: type {kind}"
    for attribute in _foreign_attributes(op, table):
        yield f"{op.name}: attribute {attribute}"
    for limit in table.limits:
        if limit.op == op.name and limit.rule != DROPS and (seen := _RULES[limit.rule](op, limit)):
            yield f"{op.name}: {seen} ({limit.what})"


def _element_types(op: ir.Operation) -> set[str]:
    """Types of an operation's operands, results and constants, as StableHLO writes them."""
    types = {value.type for value in (*op.operands, *op.results)}
    return {str(t.element_type) for t in types if isinstance(t, ir.ShapedType)}


def _foreign_attributes(op: ir.Operation, table: PluginTable) -> Iterator[str]:
    """Attributes of dialects whose operations the plug-in does not know either."""
    dialects = {name.partition(".")[0] for name in table.ops} | {"builtin", "arith"}
    for name in op.attributes:
        text = str(op.attributes[name])
        dialect = text[1:].partition(".")[0] if text.startswith("#") else ""
        if dialect.isidentifier() and "<" not in dialect and dialect not in dialects:
            yield f"{name} of dialect {dialect}"


def _body(op: ir.Operation) -> str:
    """What a reduction combines two elements by: the operation in its body, for and and or with
    the type; "arg" for several of two arrays.
    """
    (block,) = op.regions[0].blocks
    inner = [x.operation for x in block if not x.operation.name.endswith(".return")]
    names = [x.name.partition(".")[2] for x in inner]
    if len(inner) == 1 and names[0] in ("and", "or"):
        return f"{names[0]}:{ir.ShapedType(inner[0].results[0].type).element_type}"
    if len(inner) > 1 and len(block.arguments) == 4 and "compare" in names:
        return "arg"
    return "+".join(names)


def _check_body(op: ir.Operation, limit: Limit) -> str:
    found = _body(op)
    return "" if found in limit.allowed else f"combines by {found}"


def _check_arrays(op: ir.Operation, limit: Limit) -> str:
    arrays = len(op.results)
    return "" if arrays <= limit.most else f"of {arrays} arrays"


def _check_keys(op: ir.Operation, limit: Limit) -> str:
    """A comparison uses arguments 2k and 2k + 1 for the array k."""
    (block,) = op.regions[0].blocks
    used = [number for number, argument in enumerate(block.arguments) if any(argument.uses)]
    keys = max(used, default=0) // 2 + 1
    return "" if keys <= limit.most else f"by {keys} keys"


def _check_half_dot(op: ir.Operation, limit: Limit) -> str:
    given = {str(ir.ShapedType(x.type).element_type) for x in op.operands}
    result = str(ir.ShapedType(op.results[0].type).element_type)
    return f"{'x'.join(sorted(given))} to {result}" if given & {"bf16", "f16"} - {result} else ""


_RULES: dict[str, Callable[[ir.Operation, Limit], str]] = {
    "body": _check_body,
    "arrays": _check_arrays,
    "keys": _check_keys,
    "half_dot_result": _check_half_dot,
}
"""How a limit is checked: what is said of an operation that breaks it, else nothing."""


def relied_on_drops(traced: jax.stages.Traced, table: PluginTable) -> list[str]:
    """Scatters that may have to drop what is out of bounds, where the plug-in does not; a line for
    each kind and place, sorted.

    StableHLO drops always, so that only JAX's own program says which scatters need it not: those
    whose mode is `clip` or `promise_in_bounds`.
    """
    limits = [limit for limit in table.limits if limit.rule == DROPS]
    found = {
        f"{limit.op}: {equation.primitive.name} may have to drop indices ({limit.what})"
        for limit in limits
        for equation in _equations(traced.jaxpr.jaxpr)
        if equation.params.get("mode") == GatherScatterMode.FILL_OR_DROP
        and equation.primitive.name.startswith("scatter")
    }
    return sorted(found)


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a program, those inside others included."""
    for equation in jaxpr.eqns:
        yield equation
        for part in jax.tree.leaves(tuple(equation.params.values())):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


class OpCount(NamedTuple):
    """Operations that a run of a program starts; each may be a kernel launch."""

    total: int
    in_layers: int  # inside the scans over the layers


def count_ops(module: ir.Module) -> OpCount:
    """Operations that one run starts, of which a back end may fuse some.

    A loop with a constant end counts as often as it runs; one whose end is computed counts once.
    Loops of the program itself, not inside others, are taken for those over the layers.
    """
    functions = {
        ir.StringAttr(op.attributes["sym_name"]).value: op.operation
        for op in module.body
        if op.operation.name == "func.func"
    }
    known: dict[str, OpCount] = {}

    def of_function(name: str) -> OpCount:
        if name not in known:
            known[name] = of_regions(functions[name])
        return known[name]

    def of_regions(op: ir.Operation) -> OpCount:
        counts = [of_op(x.operation) for region in op.regions for block in region for x in block]
        return OpCount(sum(c.total for c in counts), sum(c.in_layers for c in counts))

    def of_op(op: ir.Operation) -> OpCount:
        if op.name == "stablehlo.while":
            total = _trips(op) * of_regions(op).total
            return OpCount(total, total)
        if op.name == "func.call":
            return of_function(ir.FlatSymbolRefAttr(op.attributes["callee"]).value)
        return OpCount(int(op.name not in NOT_STARTED), 0)

    return of_function("main")


def _trips(loop: ir.Operation) -> int:
    """How often a counted loop runs; 1 where its end is not a constant."""
    for block in loop.regions[0]:
        for op in block:
            if op.operation.name == "stablehlo.compare":
                end = op.operation.operands[1].owner
                if isinstance(end, ir.OpView | ir.Operation):
                    return _constant(end.operation)
    return 1


def _constant(op: ir.Operation) -> int:
    if op.name != "stablehlo.constant":
        return 1
    return int(ir.DenseIntElementsAttr(op.attributes["value"])[0])


def op_kinds(module: ir.Module) -> Counter[str]:
    """How often each operation stands in a program's text."""
    kinds: Counter[str] = Counter()

    def visit(op: ir.Operation) -> ir.WalkResult:
        kinds[op.operation.name] += 1
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return kinds


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
