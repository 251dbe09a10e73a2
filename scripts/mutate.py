"""Plants small faults into the code and sees whether the tests notice: python scripts/mutate.py

    python scripts/mutate.py placement --sample 100      100 faults in one room, chosen by --seed
    python scripts/mutate.py moe ops --source router     only files whose path holds `router`
    python scripts/mutate.py ops --tests test_linear     only these of the room's tests
    python scripts/mutate.py --list                      the rooms, their faults and their tests

A fault (a mutant) changes one thing: a comparison, an operator, a constant, a condition, the order
of two arguments, a statement. Each is written into a copy of the checkout, where the room's quick
tests run until one fails. A fault that no test notices is printed with its place: it wants a test,
or a reason why it changes nothing. The table at the end is Markdown, as docs/log.md has it.

Exit codes: 0 done, whatever was found; 2 a mistake, or tests that fail without any fault.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("moe_jax", "tests", "configs", "scripts", "docs", "pyproject.toml")
# Imported once, before the processes that run the tests are forked.
WARM = (
    *("jax", "jax.numpy", "flax.nnx", "optax", "scipy.optimize", "hypothesis", "jaxtyping"),
    *("beartype", "orbax.checkpoint", "pydantic", "yaml", "typer", "tokenizers", "pytest"),
)


class Room(NamedTuple):
    """Code and the tests that should notice its faults, the quickest first."""

    sources: tuple[str, ...]
    tests: tuple[str, ...]


ROOMS = {
    "placement": Room(
        ("moe_jax/placement/*.py",), ("tests/placement", "tests/cli/test_placement.py")
    ),
    "ops": Room(("moe_jax/ops/**/*.py",), ("tests/ops",)),
    "moe": Room(("moe_jax/moe/*.py",), ("tests/moe",)),
    "packing": Room(
        ("moe_jax/data/packing.py", "moe_jax/data/corpus.py"), ("tests/data/test_corpus.py",)
    ),
    "checkpoint": Room(("moe_jax/checkpoint/*.py",), ("tests/checkpoint",)),
    "sampling": Room(("moe_jax/generation/sampling.py",), ("tests/generation/test_sampling.py",)),
    "optimizer": Room(
        ("moe_jax/training/optimizer.py",),
        ("tests/training/test_optimizer.py", "tests/test_invariants.py"),
    ),
    "step": Room(
        ("moe_jax/training/step.py", "moe_jax/training/gradients.py"),
        ("tests/training/test_optimizer.py", "tests/test_invariants.py"),
    ),
}


# Faults

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
PAIRS = (
    *("min max", "minimum maximum", "argmin argmax", "amin amax", "any all", "floor ceil"),
    *("zeros ones", "zeros_like ones_like", "cumsum cumprod", "pmin pmax", "append extend"),
)
NAMES = {left: right for pair in PAIRS for left, right in (pair.split(), reversed(pair.split()))}


class Place(NamedTuple):
    """Where a node hangs: an entry of a list field, or a field."""

    parent: ast.AST
    field: str
    position: int | None

    def put(self, node: ast.AST) -> None:
        if self.position is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.position] = node


class Mutant(NamedTuple):
    """One fault: a file's source with it, and what was changed."""

    path: Path
    """Relative to the checkout."""
    line: int
    change: str
    source: str


def nodes(parent: ast.AST) -> Iterator[tuple[ast.AST, Place]]:
    """What runs below a node and may be changed: no annotations, decorators, messages or code for
    type checkers.
    """
    for field, value in ast.iter_fields(parent):
        if field in ("annotation", "returns", "decorator_list", "exc", "bases", "type_params"):
            continue
        for index, node in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(node, ast.AST) or _inert(node):
                continue
            yield node, Place(parent, field, index if isinstance(value, list) else None)
            yield from nodes(node)


def _inert(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return docstring or isinstance(node, (ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Assert))


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in a node's place."""
    match node:
        case ast.Compare(left, [operator], right):
            for other in COMPARISONS[type(operator)]:
                yield ast.Compare(left, [other()], right)
        case ast.BinOp(left, operator, right):
            texts = isinstance(left, (ast.Constant, ast.JoinedStr)) and "'" in ast.unparse(left)
            if type(operator) in OPERATORS and not texts:
                yield ast.BinOp(left, OPERATORS[type(operator)](), right)
        case ast.AugAssign(target, operator, value) if type(operator) in OPERATORS:
            yield ast.AugAssign(target, OPERATORS[type(operator)](), value)
        case ast.BoolOp(operator, values):
            yield ast.BoolOp(ast.Or() if isinstance(operator, ast.And) else ast.And(), values)
        case ast.UnaryOp(ast.Not() | ast.USub() | ast.Invert(), operand):
            yield operand
        case ast.Constant(bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(int() as value):
            yield ast.Constant(value + 1)
            if value > 0:
                yield ast.Constant(value - 1)
        case ast.Constant(float() as value):
            yield ast.Constant(value * 2 if value else 1.0)
        case ast.If(test, body, orelse):
            yield ast.If(ast.UnaryOp(ast.Not(), test), body, orelse)
        case ast.IfExp(test, body, orelse):
            yield ast.IfExp(test, orelse, body)
        case ast.Name(name, context) if name in NAMES:
            yield ast.Name(NAMES[name], context)
        case ast.Attribute(value, name, context) if name in NAMES:
            yield ast.Attribute(value, NAMES[name], context)
        case ast.Call(ast.Attribute(_, "where") as called, [test, yes, no], keywords):
            yield ast.Call(called, [test, no, yes], keywords)
    match node:
        case ast.Expr(ast.Call()) | ast.AugAssign() | ast.Raise() | ast.Continue() | ast.Break():
            yield ast.Pass()


def mutants(path: Path, source: str) -> list[Mutant]:
    """All faults of a file, each once."""
    tree = ast.parse(source)
    made: dict[str, Mutant] = {}
    for node, place in list(nodes(tree)):
        for other in variants(node):
            shown = place.parent if isinstance(place.parent, ast.expr) else None
            before = _short(shown or node)
            place.put(other)
            changed = ast.unparse(ast.fix_missing_locations(tree))
            change = f"{before} -> {_short(shown or other)}"
            place.put(node)
            made.setdefault(changed, Mutant(path, getattr(node, "lineno", 0), change, changed))
    made.pop(ast.unparse(tree), None)
    return list(made.values())


def _short(node: ast.AST, most: int = 60) -> str:
    """A node's source on one line; of an `if`, the condition."""
    text = f"if {ast.unparse(node.test)}" if isinstance(node, ast.If) else ast.unparse(node)
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


# Running tests on them


class Copy:
    """A copy of the checkout into which faults are written, and the process that tests it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            source, target = ROOT / name, folder / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        self.written = 0

    def write(self, path: Path, source: str) -> None:
        """Replaces a file, with a time of its own: compiled files are told apart by it."""
        self.written += 1
        (self.folder / path).write_text(source, encoding="utf-8")
        when = time.time() + 10 * self.written
        os.utime(self.folder / path, (when, when))

    def test(self, tests: Sequence[str], limit: float) -> str:
        """How the tests end: passed, failed, or timed out after `limit` seconds."""
        ends = time.monotonic() + limit
        if not (child := os.fork()):
            self._run_tests(tests)
        while time.monotonic() < ends:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return "failed" if os.waitstatus_to_exitcode(status) else "passed"
            time.sleep(0.02)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "timed out"

    def _run_tests(self, tests: Sequence[str]) -> NoReturn:
        """In the child: pytest until a test fails; a fault may write anything, so nothing is
        shown.
        """
        code = 1
        try:
            os.setpgid(0, 0)
            silent = os.open(os.devnull, os.O_RDWR)
            for number in range(3):
                os.dup2(silent, number)
            os.chdir(self.folder)
            os.environ["PYTHONPATH"] = str(self.folder)
            sys.path.insert(0, str(self.folder))
            sys.dont_write_bytecode = self.written > 0
            import pytest

            quick = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
            code = int(pytest.main([*quick, *tests]))
        finally:
            os._exit(code)


class Result(NamedTuple):
    """What became of a room's faults."""

    room: str
    all: int
    tried: int
    survived: list[Mutant]
    timed_out: int


def sources_of(room: str, words: Sequence[str]) -> list[Path]:
    """The files of a room whose path holds one of the words, or all of them."""
    paths = []
    for pattern in ROOMS[room].sources:
        matching = sorted(path.relative_to(ROOT) for path in ROOT.glob(pattern))
        if not matching:
            fail(f"{room}: no file is {pattern}; correct ROOMS in scripts/mutate.py.")
        paths += [path for path in matching if path.name != "__init__.py"]
    return [path for path in paths if not words or any(word in str(path) for word in words)]


def tests_for(room: str, source: Path, words: Sequence[str] = ()) -> list[str]:
    """The room's tests whose path holds one of the words, or all of them; those first that have
    the file's name.
    """
    files = []
    for name in ROOMS[room].tests:
        path = ROOT / name
        files += sorted(path.glob("test_*.py")) if path.is_dir() else [path]
    names = [str(path.relative_to(ROOT)) for path in files]
    names = [name for name in names if not words or any(word in name for word in words)]
    return sorted(names, key=lambda name: source.stem not in name)


def try_room(copy: Copy, room: str, args: argparse.Namespace) -> Result:
    """Tests a sample of a room's faults, one after the other."""
    every = [
        mutant
        for path in sources_of(room, args.source)
        for mutant in mutants(path, (ROOT / path).read_text(encoding="utf-8"))
    ]
    chosen = random.Random(args.seed).sample(every, min(args.sample or len(every), len(every)))
    say(f"{room}: {len(chosen)} of {len(every)} faults; first the tests without any")
    began = time.monotonic()
    if (ended := copy.test(tests_for(room, Path(), args.tests), 3600)) != "passed":
        fail(f"{room}: the tests {ended} without any fault: make them pass first.")
    took = time.monotonic() - began
    limit = args.limit or 3 * took + 10
    say(f"{room}: they passed in {took:.0f} s; a fault has {limit:.0f} s")
    survived, timed_out, began = [], 0, time.monotonic()
    for number, mutant in enumerate(chosen, 1):
        copy.write(mutant.path, mutant.source)
        ended = copy.test(tests_for(room, mutant.path, args.tests), limit)
        copy.write(mutant.path, (ROOT / mutant.path).read_text(encoding="utf-8"))
        timed_out += ended == "timed out"
        if ended == "passed":
            survived.append(mutant)
        left = (time.monotonic() - began) / number * (len(chosen) - number)
        word = "SURVIVED" if ended == "passed" else "killed"
        where = f"[{number}/{len(chosen)}] {word:8} {mutant.path}:{mutant.line}"
        say(f"{where}  {mutant.change}  ({left / 60:.0f} min left)")
    return Result(room, len(every), len(chosen), survived, timed_out)


def table(results: Sequence[Result]) -> str:
    """The counts, and then each fault that no test noticed."""
    lines = ["| room | faults | tried | killed | of them by time | survived |", "|" + "---|" * 6]
    for room, every, tried, survived, timed_out in results:
        killed = tried - len(survived)
        lines.append(f"| {room} | {every} | {tried} | {killed} | {timed_out} | {len(survived)} |")
    for result in results:
        for path, line, change, _ in result.survived:
            lines.append(f"- `{path}:{line}` `{change}`")
    return "\n".join(lines)


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def fail(text: str) -> NoReturn:
    """Ends with one sentence."""
    print(f"mutate: {text}", file=sys.stderr)
    raise SystemExit(2)


def warm_up() -> None:
    """Imports what all tests need; nothing of the package, and no JAX back end is started."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    warnings.filterwarnings("ignore", message=".*fork")
    for name in WARM:
        __import__(name)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rooms", nargs="*", metavar="ROOM", help=f"of {', '.join(ROOMS)}; or all")
    parser.add_argument("--sample", type=int, metavar="N", help="faults per room; or all of them")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="chooses the sample")
    parser.add_argument(
        "--source", action="append", default=[], metavar="WORD", help="only files so named"
    )
    parser.add_argument(
        "--tests", action="append", default=[], metavar="WORD", help="only tests of files so named"
    )
    parser.add_argument(
        "--limit", type=float, metavar="SECONDS", help="per fault; or 3 times the tests' own time"
    )
    parser.add_argument("--list", action="store_true", help="list the rooms and test nothing")
    args = parser.parse_args(argv)
    if unknown := [room for room in args.rooms if room not in ROOMS]:
        parser.error(f"there is no room {unknown[0]}: choose among {', '.join(ROOMS)}")
    if args.sample is not None and args.sample < 1:
        parser.error(f"--sample {args.sample} is not at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Tests the faults of each room and prints the table."""
    args = arguments(argv)
    rooms = args.rooms or list(ROOMS)
    if args.list:
        for room in rooms:
            for path in sources_of(room, args.source):
                count = len(mutants(path, (ROOT / path).read_text(encoding="utf-8")))
                print(f"{room:11} {count:5} {path}  ({', '.join(ROOMS[room].tests)})")
        return
    warm_up()
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder))
        print(table([try_room(copy, room, args) for room in rooms]))


if __name__ == "__main__":
    main()
