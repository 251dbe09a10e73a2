"""What a command imports: each only what it needs, so that it starts soon."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.command import run_module
from tests.support.hf_folder import make_folder

# What a person has not set; GLIBC_TUNABLES would spare the command to start itself again.
UNSET = ("XLA_FLAGS", "TF_CPP_MIN_LOG_LEVEL", "GLIBC_TUNABLES", "NPROC")


def loaded_by(command: str) -> set[str]:
    """All modules in a new process after a command."""
    done = run_module("command_modules", command)
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
    modules = [name for name in loaded_by("generate") if name.startswith("moe_jax.")]
    assert {"moe_jax.generation.generate", "moe_jax.inference.engine"} <= set(modules)
    assert [name for name in modules if name.startswith("moe_jax.training")] == []
    assert [name for name in sorted(modules) if imports_optax(name)] == []


def test_train_needs_nothing_of_chat() -> None:
    modules = [name for name in loaded_by("train") if name.startswith("moe_jax.")]
    assert {"moe_jax.training.step", "moe_jax.cli.main"} <= set(modules)
    assert [name for name in modules if name.endswith(".chat")] == []
    assert imports_optax("moe_jax.training.optimizer")  # or the test above would see nothing


# (Typer itself takes pydantic to read options.)
SLOW = {"jax", "numpy", "scipy", "yaml", "rich", "matplotlib", "tokenizers"}


def test_help_imports_nothing_that_takes_long() -> None:
    modules = loaded_by("help")
    assert "moe_jax.cli.inference" in modules and modules & SLOW == set()


def test_the_process_is_prepared_before_jax_is_imported() -> None:
    assert "jax" not in loaded_by("prepare")


@pytest.mark.slow  # tests/runtime/test_process.py has the setting, and the test above the order
def test_the_second_start_is_as_quiet_as_the_first(tmp_path: Path) -> None:
    """XLA:CPU has much to say of each program that it reads from the compile cache."""
    folder = make_folder("qwen3_moe-plain", tmp_path / "model")
    environment = {name: value for name, value in os.environ.items() if name not in UNSET}
    environment |= {"PYTHONPATH": str(ROOT), "MOE_JAX_CACHE": str(tmp_path / "cache")}
    command = ["-m", "moe_jax", "generate", str(folder), "--prompt", "The sea", "--max-tokens", "3"]
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        said.append(re.sub(r"[\d.,]+", "N", done.stderr))
    assert any((tmp_path / "cache").rglob("*-cache"))  # or there was nothing to be said
    assert said[0] == said[1] and said[0].count("\n") == 2
