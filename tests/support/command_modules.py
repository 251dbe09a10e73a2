"""What a command imports, in a process of its own.

    python -m tests.support.command_modules generate|train|help|prepare

Runs the command as far as the fakes go and prints the names of all loaded modules as JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from moe_jax.cli import main
from tests.support import ROOT

COMMANDS = {
    "generate": ["generate", "tests", "--prompt", "U:x\nA:", "--greedy"],
    "train": ["train", str(ROOT / "configs" / "tiny.yaml")],
    "help": ["generate", "--help"],
    "prepare": ["generate", "tests", "--prompt", "x", "--top-p", "0.5"],
}


def replace_model() -> None:
    """A whole text by a model that shouts; what opening a real model imports is imported too."""
    importlib.import_module("moe_jax.inference.load")
    from moe_jax.cli import inference
    from moe_jax.cli.model_options import Opened
    from tests.support import fake_model

    def load(
        choice: object, check: object = None, check_plan: object = None, redundant_slots: int = 0
    ) -> Opened:
        return Opened(fake_model.Loaded(fake_model.shout), 1, 0)  # type: ignore[arg-type]

    inference.load_model = load


def replace_training() -> None:
    """A training that ends before its first step."""
    from moe_jax.data.corpus import SamplePrompt
    from moe_jax.training import trainer

    def train(*arguments: object, **options: object) -> trainer.TrainingResult:
        return trainer.TrainingResult(Path(), 0, False, None, False, SamplePrompt("", []))

    trainer.train = train


def stop_when_prepared() -> None:
    """Some settings of the process must come before JAX: nothing is done after them."""
    prepare = main.prepare_process

    def stop() -> None:
        prepare()
        raise SystemExit(0)

    main.prepare_process = stop


def run(name: str) -> None:
    if name == "generate":
        replace_model()
    elif name == "train":
        replace_training()
    elif name == "prepare":
        stop_when_prepared()
    try:
        main.main(COMMANDS[name])
    except SystemExit as end:
        assert end.code == 0, end.code
    print("\n" + json.dumps(sorted(sys.modules)))


if __name__ == "__main__":
    run(sys.argv[1])
