"""The house rules that a machine can check: who imports what, how long things are, what is
global.
"""

from __future__ import annotations

import ast
import collections
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.command import run_module

PACKAGE = ROOT / "moe_jax"


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {module: ast.parse(path.read_text()) for module, path in MODULES.items()}
FILES = sorted([*MODULES.values(), *(ROOT / "scripts").glob("*.py")])

# The rooms from the ground up, as docs/architecture.md has them: a module imports from its own
# floor or from those below it.
FLOORS = (
    ("errors", "utils"),
    ("config", "runtime", "parallel"),
    ("ops",),
    ("placement",),
    ("moe",),
    ("models",),
    ("data", "checkpoint", "hf", "profiling"),
    ("tracking", "model_io"),
    ("training", "inference"),
    ("generation",),
    ("serving", "forecasting"),
    ("launch", "benchmarks", "preflight"),
    ("cli",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
APART = ({"training", "inference"},)  # rooms of one floor that do not know each other
FACES = ("moe_jax", "moe_jax.__main__")  # the Python API and `python -m`: they hand names on

# What an accelerator machine without the rest of the dependencies must be able to import.
CORE = [
    module
    for module in MODULES
    if module.split(".")[1:2]
    and module.split(".")[1] in ("parallel", "ops", "placement", "moe", "models")
    if module != "moe_jax.placement.files"  # reads YAML
]
NUMERIC = {"jax", "flax", "numpy", "scipy", "optax"}  # jax itself needs scipy
# flax itself imports rich and yaml.
UNNEEDED = (
    *("pydantic", "grain", "orbax", "typer", "transformers", "tokenizers", "matplotlib"),
    *("tensorboardX", "jaxtyping"),
)


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(module: str) -> set[str]:
    """Modules that a file imports anywhere in it, those for type checkers included."""
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in inner}
    return found - {module}


def inner_imports(module: str) -> set[str]:
    return {name for name in imports(module) if name in MODULES and name != "moe_jax"}


def test_every_room_has_a_floor_and_opens_with_what_it_is_for() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert rooms <= FLOOR.keys()
    for folder in {path.parent for path in MODULES.values()}:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


@pytest.mark.parametrize("module", [module for module in MODULES if module not in FACES])
def test_imports_point_down(module: str) -> None:
    own = room_of(module)
    for name in inner_imports(module):
        other = room_of(name)
        assert FLOOR[other] <= FLOOR[own], f"{module} imports {name} from a higher floor"
        assert own == other or {own, other} not in APART, f"{module} imports {name}"


@pytest.mark.parametrize("module", CORE)
def test_the_core_imports_nothing_foreign(module: str) -> None:
    for name in imports(module):
        top = name.split(".")[0]
        assert top == "moe_jax" or top in sys.stdlib_module_names or top in NUMERIC, name


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {module: inner_imports(module) for module in MODULES}
    done: set[str] = set()
    while ready := {module for module in graph.keys() - done if graph[module] <= done}:
        done |= ready
    assert graph.keys() == done


# Who may see the whole configuration: those who read it and the jobs.
WHOLE_CONFIG = (
    *("moe_jax.config.load", "moe_jax.config.schema", "moe_jax.cli.main"),
    *("moe_jax.tracking.run_dir", "moe_jax.tracking.environment", "moe_jax.benchmarks.training"),
    *(
        "moe_jax.training.trainer",
        "moe_jax.training.initial_state",
        "moe_jax.training.placement.initial",
    ),
    *("moe_jax.training.resize.resize", "moe_jax.training.resize.host_state"),
    *("moe_jax.preflight.job", "moe_jax.preflight.programs", "moe_jax.preflight.advice"),
)


def uses_whole_config(module: str) -> bool:
    """Whether a file imports `schema.Config`, or reaches for it as an attribute of the module."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names} & {"Config", "*"}
            if node.module == "moe_jax.config.schema" and names:
                return True
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "schema.Config":
            return True
    return False


def test_only_jobs_see_the_whole_configuration() -> None:
    seen = {module for module in MODULES if uses_whole_config(module)} - set(FACES)
    assert {"moe_jax.training.trainer", "moe_jax.config.load"} <= seen <= set(WHOLE_CONFIG)


@pytest.mark.parametrize(
    "what",
    [["import", *CORE, "moe_jax.training.step"], ["run", "scripts/benchmark.py", "--help"]],
    ids=["core", "benchmark"],
)
def test_works_with_jax_flax_optax_and_numpy_alone(what: list[str]) -> None:
    done = run_module("without_packages", ",".join(UNNEEDED), *what, timeout=120)
    assert done.returncode == 0, done.stderr


# Sizes


def test_a_folder_holds_at_most_15_files() -> None:
    files = [path for path in MODULES.values() if path.name != "__init__.py"]
    folders = collections.Counter(path.parent for path in files)
    assert {str(folder): count for folder, count in folders.items() if count > 15} == {}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_lines_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 500
    assert max(map(len, text.splitlines()), default=0) <= 100
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None and node.end_lineno - node.lineno < 75, node.name


# Habits


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_error_is_swallowed(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: a bare except"
            assert not all(isinstance(child, ast.Pass) for child in node.body), node.lineno
        # `contextlib.suppress` is the same by another name.
        assert not (isinstance(node, ast.Attribute) and node.attr == "suppress"), node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_flax_is_inherited_from(path: Path) -> None:
    """No towers of bases: tuples, exceptions and protocols of libraries aside, a class stands
    alone.
    """
    plain = {
        *("NamedTuple", "Exception", "UserError", "Protocol", "nnx.Module", "nnx.Variable"),
        *("yaml.SafeLoader", "yaml.SafeDumper"),
    }
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            assert {ast.unparse(base) for base in node.bases} <= plain, node.name


def process_effects(tree: ast.AST) -> Iterator[str]:
    """What changes the process as a whole: JAX's settings, the environment, signals, hooks,
    logging.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            pattern = (
                r"jax\.config\.update|os\.(environ\.\w+|execv\w*)|signal\.signal|.*\.addFilter"
            )
            if re.fullmatch(pattern, call) and call != "os.environ.get":
                yield f"line {node.lineno}: {call}"
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.Delete)):
            targets = node.targets if isinstance(node, (ast.Assign, ast.Delete)) else [node.target]
            for target in map(ast.unparse, targets):
                if re.match(r"os\.environ\[|sys\.\w*hook$", target):
                    yield f"line {node.lineno}: {target}"


@pytest.mark.parametrize("module", MODULES)
def test_process_wide_effects_are_in_runtime_alone(module: str) -> None:
    if room_of(module) != "runtime":
        assert list(process_effects(TREES[module])) == []


@pytest.mark.parametrize("module", MODULES)
def test_production_code_patches_nothing(module: str) -> None:
    assert not any("mock" in name for name in imports(module))


# Tests

TESTS = sorted((ROOT / "tests").rglob("*.py"))


def bad_habits(tree: ast.AST) -> Iterator[str]:
    """What tests do without: replaced entries of `sys.modules`, `eval`, programs in strings."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.Delete)):
            targets = [node.target] if isinstance(node, ast.AugAssign) else node.targets
            for target in targets:
                if isinstance(target, ast.Subscript) and "sys.modules" in ast.unparse(target.value):
                    yield f"line {node.lineno}: {ast.unparse(target)} is replaced"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("eval", "exec"):
                yield f"line {node.lineno}: {called}"
            changes = re.fullmatch(r".*(item|setdefault|update|pop|dict)", called)
            if changes and "sys.modules" in ast.unparse(node):
                yield f"line {node.lineno}: {called} replaces a module"
        if isinstance(node, (ast.List, ast.Tuple)):
            words = [ast.unparse(word) for word in node.elts]
            if "'-c'" in words and not words[words.index("'-c'") + 1 :]:
                yield f"line {node.lineno}: -c without a program beside it"
            elif "'-c'" in words and (program := words[words.index("'-c'") + 1]):
                yield from _long_program(tree, program, node.lineno)


def _long_program(tree: ast.AST, program: str, line: int) -> Iterator[str]:
    """A program that is given to `python -c`, by name or as it is, and has more than one line."""
    texts = [program]
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and program in map(ast.unparse, node.targets):
            texts.append(ast.unparse(node.value))
    if any("\\n" in text or "\n" in text for text in texts):
        yield f"line {line}: a program in a string; make it a module of tests/support"


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_have_no_bad_habits(path: Path) -> None:
    assert list(bad_habits(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "source",
    [
        "sys.modules['x'] = y",
        "monkeypatch.setitem(sys.modules, 'x', y)",
        "del sys.modules['x']",
        "found = eval(done.stdout)",
        "CODE = 'import a\\nimport b'\nrun([python, '-c', CODE])",
        "run([python, '-c', f'import a\\nimport {b}'])",
    ],
)
def test_bad_habits_are_seen(source: str) -> None:
    assert len(list(bad_habits(ast.parse(source)))) == 1


def test_modules_of_tests_have_one_name() -> None:
    """Each is imported from the root, as `tests.support.x`; so no module is loaded twice."""
    own = {path.stem for path in TESTS} - {"__init__"}
    for path in TESTS:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            for name in names:
                top = name.split(".")[0]
                foreign = top in sys.stdlib_module_names or top in ("moe_jax", "tokenizers")
                assert top not in own or foreign, f"{path}: {name}"


# Functions of one name that several files have on purpose: commands beside what they call, and what
# each family of models gives.
INTERFACES = {"hf/families": {"FAMILY", "names", "read", "write"}}


def public_definitions(module: str) -> Iterator[str]:
    for node in TREES[module].body:
        names: list[str] = []
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [
                leaf.id
                for target in node.targets
                for leaf in ast.walk(target)
                if isinstance(leaf, ast.Name)
            ]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        yield from (name for name in names if not name.startswith("_"))


def test_no_public_name_is_defined_twice() -> None:
    where: dict[str, list[str]] = collections.defaultdict(list)
    for module in MODULES:
        shared = next(
            (names for folder, names in INTERFACES.items() if folder.replace("/", ".") in module),
            set(),
        )
        if room_of(module) != "cli" and module not in FACES:
            for name in set(public_definitions(module)) - shared:
                where[name].append(module)
    assert {name: modules for name, modules in where.items() if len(modules) > 1} == {}


# The walk in docs/architecture.md

WALK = re.compile(r"^\d+\. `(?P<module>[\w./]+)` `(?P<name>[\w.]+)`")


def walk_steps() -> list[tuple[str, str]]:
    text = (ROOT / "docs" / "architecture.md").read_text()
    part = text.split("## From the command to the collective")[1].split("\n## ")[0]
    return [(m["module"], m["name"]) for m in map(WALK.match, part.splitlines()) if m]


def definition(module: str, name: str) -> ast.AST | None:
    node: ast.AST | None = ast.parse((PACKAGE / module).read_text())
    for part in name.split("."):
        node = next(
            (
                child
                for child in ast.walk(node)
                if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and child.name == part
            ),
            None,
        )
        if node is None:
            return None
    return node


def test_the_walk_in_the_architecture_exists() -> None:
    """Each step is a definition in the file that the page names, and the text of a step names
    the next.
    """
    steps = walk_steps()
    assert len(steps) >= 10 and steps[-1][1] == "all_to_all"
    for (module, name), (_, following) in itertools.pairwise(steps):
        node = definition(module, name)
        assert node is not None, f"{module} has no {name}"
        called = following.split(".")[0 if following.endswith("__call__") else -1]
        mentioned = {leaf.id for leaf in ast.walk(node) if isinstance(leaf, ast.Name)}
        mentioned |= {leaf.attr for leaf in ast.walk(node) if isinstance(leaf, ast.Attribute)}
        assert called in mentioned or following.endswith("__call__"), (
            f"{name} does not call {following}"
        )
    assert definition(*steps[-1]) is not None
