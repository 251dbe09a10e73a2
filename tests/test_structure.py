"""The house rules that a machine can check: who imports what, how long things are, and what must
work without what.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGE = ROOT / "moe_jax"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}

# Who may see the whole configuration: those who build it, and the jobs.
JOBS = (
    "starting",
    "initial",
    "train",
    "run_dir",
    "generate",
    "cli",
    "benchmark",
    "resize",
    "run_arrays",
)
WHOLE_CONFIG = {f"moe_jax.{name}" for name in ("config", "schema", *JOBS)}

# The rooms from the ground up; a module imports from its own floor or from those below it.
FLOORS = [
    {"errors", "annotations", "settings"},
    {"schema", "architecture", "spmd", "ops", "rope"},
    {"sharding", "placement", "mesh"},
    {"moe"},
    {"layers"},
    {"model"},
    {"optim", "slots"},
    {"step"},
]
# What has no floor here, the jobs and their helpers, stands on top of all of them.
NUMERIC = {"jax", "flax", "numpy", "scipy", "optax"}  # jax itself needs scipy
# flax itself imports rich and yaml.
UNNEEDED = (
    "pydantic",
    "grain",
    "orbax",
    "typer",
    "transformers",
    "tokenizers",
    "matplotlib",
    "tensorboardX",
    "jaxtyping",
)


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere in it, those for type checkers alone left out."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if is_type_checking(node)
        for child in ast.walk(ast.Module(node.body, []))
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in inner}
    return found


def is_type_checking(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def floor_of(module: str) -> int | None:
    room = module.removeprefix("moe_jax.").split(".")[0]
    return next((number for number, rooms in enumerate(FLOORS) if room in rooms), None)


CORE = sorted(module for module in MODULES if floor_of(module) is not None)


@pytest.mark.parametrize("module", CORE)
def test_the_core_imports_downward_and_nothing_foreign(module: str) -> None:
    for name in imports(MODULES[module]):
        top = name.split(".")[0]
        if top == "moe_jax":
            below = floor_of(name)
            assert below is not None, f"{module} imports {name}, which stands above it"
            assert below <= floor_of(module), f"{module} imports {name} from a higher floor"
        else:
            allowed = NUMERIC | {"jaxtyping"} if module == "moe_jax.utils.annotations" else NUMERIC
            assert top in sys.stdlib_module_names or top in allowed, f"{module} imports {name}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {
        module: {name for name in imports(path) if name in MODULES}
        for module, path in MODULES.items()
    }
    done: set[str] = set()
    while ready := {module for module in graph.keys() - done if graph[module] <= done}:
        done |= ready
    assert graph.keys() == done


def uses_whole_config(path: Path) -> bool:
    """Whether a file imports `schema.Config`, or reaches for it as an attribute of the module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module == "moe_jax.config.schema"
            and any(alias.name in ("Config", "*") for alias in node.names)
        ):
            return True
        if (
            isinstance(node, ast.Attribute)
            and node.attr == "Config"
            and isinstance(node.value, ast.Name)
            and node.value.id == "schema"
        ):
            return True
    return False


def test_only_jobs_see_the_whole_configuration() -> None:
    seen = {module for module, path in MODULES.items() if uses_whole_config(path)}
    assert {"moe_jax.training.trainer", "moe_jax.config.load"} <= seen <= WHOLE_CONFIG


BLOCKED = """
import sys
for name in {names!r}:
    sys.modules[name] = None
{then}
"""


@pytest.mark.parametrize(
    "then",
    [
        "import moe_jax.ops.grouped_matmul.api, moe_jax.ops.attention.api, "
        "moe_jax.ops.cross_entropy, moe_jax.moe.layer, moe_jax.training.step",
        "import runpy; runpy.run_path('scripts/benchmark.py', run_name='imported')",
    ],
    ids=["core", "benchmark"],
)
def test_works_with_jax_flax_optax_and_numpy_alone(then: str) -> None:
    code = BLOCKED.format(names=UNNEEDED, then=then)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


FILES = sorted([*MODULES.values(), *(ROOT / "scripts").glob("*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 320
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None and node.end_lineno - node.lineno < 70, node.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_error_is_swallowed(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: a bare except"
            assert not all(isinstance(child, ast.Pass) for child in node.body), (
                f"line {node.lineno}"
            )
        # `contextlib.suppress` is the same by another name.
        assert not (isinstance(node, ast.Attribute) and node.attr == "suppress"), (
            f"line {node.lineno}"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_flax_is_inherited_from(path: Path) -> None:
    """No towers of bases: tuples, exceptions and protocols of libraries aside, a class stands
    alone.
    """
    plain = {
        "NamedTuple",
        "Exception",
        "UserError",
        "nnx.Module",
        "nnx.Variable",
        "yaml.SafeLoader",
        "yaml.SafeDumper",
    }
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            assert {ast.unparse(base) for base in node.bases} <= plain, node.name
