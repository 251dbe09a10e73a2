"""The faults that scripts/mutate.py plants: which there are, and that each changes one thing."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tests.support import ROOT


@pytest.fixture(scope="module")
def mutate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutate", ROOT / "scripts" / "mutate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("source", "changes"),
    [
        ("a < b", ["a <= b", "a >= b"]),
        ("a == b", ["a != b"]),
        ("a + b", ["a - b"]),
        ("f'{a}' + b", []),
        ("'text' + b", []),
        ("x and y", ["x or y"]),
        ("not x", ["x"]),
        ("x = 3", ["x = 4", "x = 2"]),
        ("x = 0", ["x = 1"]),
        ("x = 0.5", ["x = 1.0"]),
        ("x = True", ["x = False"]),
        ("y = jnp.where(a, b, c)", ["y = jnp.where(a, c, b)"]),
        ("y = jnp.minimum(a, b)", ["y = jnp.maximum(a, b)"]),
        ("if a:\n    f(b)", ["if not a:\n    f(b)", "if a:\n    pass"]),
        ("x -= y", ["x += y", "pass"]),
        ("raise Wrong(1 + 2)", ["pass"]),
    ],
)
def test_faults(mutate: ModuleType, source: str, changes: list[str]) -> None:
    within = f"def f(a, b):\n{_indented(source)}\n    return a"
    made = [mutant.source for mutant in mutate.mutants(Path("x.py"), within)]
    expected = [f"def f(a, b):\n{_indented(change)}\n    return a" for change in changes]
    assert made == [ast.unparse(ast.parse(source)) for source in expected]


def _indented(source: str) -> str:
    return "\n".join(f"    {line}" for line in source.splitlines())


@pytest.mark.parametrize(
    "source",
    [
        '"""Says 1 + 2."""',
        "x: Annotated[int, 1 + 2]",
        "def f(a: 'Float[1 + 2]') -> int | None:\n    return a",
        "if TYPE_CHECKING:\n    f(1)",
        "from a import b",
        "print = f'{a + 1}'",
    ],
)
def test_what_never_runs_is_left_alone(mutate: ModuleType, source: str) -> None:
    assert mutate.mutants(Path("x.py"), source) == []


def test_every_room_has_sources_and_tests(mutate: ModuleType) -> None:
    for room in mutate.ROOMS:
        for source in mutate.sources_of(room, []):
            tests = mutate.tests_for(room, source)
            assert tests and all((ROOT / test).is_file() for test in tests)
