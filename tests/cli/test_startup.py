"""What a command imports: each only what it needs, so that it starts soon."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from tests.support import ROOT

TINY = str(ROOT / "configs" / "tiny.yaml")
REPORT = "\nprint(json.dumps([name for name in sys.modules if name.startswith('moe_jax.')]))\n"

# A whole text by a model that shouts; what opening a real model imports is imported too.
GENERATE = """
import json, sys
import moe_jax.inference.load
from moe_jax.cli import inference, main
from moe_jax.cli.model_options import Opened
from tests.support import fake_model

inference.load_model = lambda choice, check=None: Opened(fake_model.Loaded(fake_model.shout), 1, 0)
try:
    main.main(["generate", "--model", "tests", "--prompt", "U:x\\nA:", "--greedy"])
except SystemExit as end:
    assert end.code == 0, end.code
print()
"""

# A training that ends before its first step.
TRAIN = f"""
import json, sys
from pathlib import Path
from moe_jax.cli import main
from moe_jax.training import trainer

trainer.train = lambda *arguments, **options: trainer.Result(Path(), 0, False, None, False)
try:
    main.main(["train", {TINY!r}])
except SystemExit as end:
    assert end.code == 0, end.code
"""


def loaded_by(code: str) -> set[str]:
    """The package's modules in a new process after `code`, which calls a command."""
    done = subprocess.run(
        [sys.executable, "-c", code + REPORT], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def imports_optax(module: str) -> bool:
    """Whether a module's own text imports optax: flax does in any case, so `sys.modules` cannot
    tell.
    """
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text())
    imported = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    return any("optax" in ast.unparse(node) for node in imported)


def test_generate_needs_nothing_of_training() -> None:
    modules = loaded_by(GENERATE)
    assert {"moe_jax.generation.generate", "moe_jax.inference.engine"} <= modules
    assert [name for name in modules if name.startswith("moe_jax.training")] == []
    assert [name for name in sorted(modules) if imports_optax(name)] == []


def test_train_needs_nothing_of_chat() -> None:
    modules = loaded_by(TRAIN)
    assert {"moe_jax.training.step", "moe_jax.cli.main"} <= modules
    assert [name for name in modules if name.endswith(".chat")] == []
    assert imports_optax("moe_jax.training.optimizer")  # or the test above would see nothing


# (Typer itself takes pydantic to read options.)
SLOW = ("jax", "numpy", "scipy", "yaml", "rich", "matplotlib", "tokenizers")
HELP = f"""
import sys
from moe_jax.cli import main

try:
    main.main(["generate", "--help"])
except SystemExit as end:
    assert end.code == 0, end.code
print([name for name in {SLOW!r} if name in sys.modules])
"""


def test_help_imports_nothing_that_takes_long() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]" and "--prompt" in done.stdout, done.stderr
