"""A resumed run: whether its text and tokenizer are still the same, whether steps are left, and how
its learning rate goes on.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.config.load import config_from_text, dump_value
from moe_jax.config.schema import DataConfig, OptimizerConfig
from moe_jax.data.run_corpus import TrainingCorpus
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.errors import UserError
from moe_jax.tracking.run_dir import read_run_config, run_tokenizer
from moe_jax.training.optimizer import make_schedule
from moe_jax.training.restore import SavedRun
from moe_jax.utils.files import local_path

SMALL_CHANGE = 0.01  # of the learning rate, relative, that is not worth a line


def own_tokenizer(run_dir: Path, data: DataConfig) -> str:
    """What `load_tokenizer` takes for a resumed run: its own copy, where it keeps one.

    Says so where the file that it was copied from has changed. Raises UserError where `data` names
    another tokenizer than the run began with.
    """
    if not (run_dir / "tokenizer").is_dir():
        return data.tokenizer
    before = read_run_config(run_dir)
    kept, began = run_tokenizer(run_dir, before), before.data.tokenizer
    named = f"data.tokenizer={data.tokenizer}"
    own = f"the run goes on with its own copy, {kept}"
    if not local_path(data.tokenizer).exists() and data.tokenizer != "bytes":
        if data.tokenizer != began:
            print(f"{named} does not exist: {own}.")
        return kept
    if load_tokenizer(data.tokenizer).fingerprint == load_tokenizer(kept).fingerprint:
        return kept
    if data.tokenizer == began:
        print(f"{named} has changed since the run began: {own}.")
        return kept
    raise UserError(
        f"{named} is another tokenizer than the run began with ({began}, of which {kept} is a "
        f"copy): leave it out, or start another run."
    )


def check_corpus(saved: SavedRun, corpus: TrainingCorpus, data: DataConfig) -> None:
    """Raises UserError where the text or the tokenizer are not those that the run began with,
    wherever they are now.
    """
    if saved.meta["corpus_hash"] == corpus.hash:
        return
    began = config_from_text(saved.meta["config"], "the checkpoint's configuration").data
    known = saved.meta.get("tokenizer_hash")  # which older versions did not keep
    if known not in (None, corpus.tokenizer_hash):
        raise UserError(
            f"data.tokenizer={data.tokenizer} is another tokenizer than the run began with "
            f"({began.tokenizer}): restore that, or start another run."
        )
    what = "text" if corpus.tokenizer_hash else "series"
    raise UserError(
        f"{_named(data)} gives other {what} (hash {corpus.hash[:12]}) than the run began "
        f"with ({_named(began)}, hash {saved.meta['corpus_hash'][:12]}): restore the "
        f"{what} (the built-in corpus changes with the Python version), or start another run."
    )


def _named(data: DataConfig) -> str:
    """The source or sources, for messages."""
    sources = ", ".join(part.source for part in data.mixture)
    return f"data.mixture of {sources}" if sources else f"data.source={data.source}"


def check_steps(step: int, steps: int, run_dir: Path) -> None:
    """Raises UserError where a run of `steps` has done more."""
    if step > steps:
        raise UserError(
            f"train.steps={steps} but the run in {run_dir} has done {step}: give more steps."
        )


class RateChange(NamedTuple):
    """A learning rate that goes on otherwise than the run was going."""

    step: int  # the last one done
    before: float  # of the next step, as the run was going
    after: float
    changed: dict[str, list[Any]]  # settings that differ, with both values

    def event(self) -> dict[str, Any]:
        """The line for metrics.jsonl."""
        return {"event": "learning_rate", **self._asdict()}

    def sentence(self) -> str:
        """The line for a person."""
        why = ", ".join(
            f"{key}={dump_value(new)} instead of {dump_value(old)}"
            for key, (old, new) in self.changed.items()
        )
        return (
            f"The learning rate goes on at {self.after:.3g} instead of {self.before:.3g}, as "
            f"{why}; to stay at the old one: --set optimizer.schedule=constant --set "
            f"optimizer.learning_rate={self.before:.6g} (docs/runs.md)."
        )


def rate_change(saved: SavedRun, optimizer: OptimizerConfig, steps: int) -> RateChange | None:
    """Whether the learning rate of a resumed run leaves the course that it had, as it does with
    another number of steps or other settings of the schedule.
    """
    began = config_from_text(saved.meta["config"], "the checkpoint's configuration")
    before = float(make_schedule(began.optimizer, began.train.steps)(saved.step))
    after = float(make_schedule(optimizer, steps)(saved.step))
    if math.isclose(before, after, rel_tol=SMALL_CHANGE):
        return None
    keys = ("learning_rate", "schedule", "warmup_steps", "final_fraction")
    pairs = {"train.steps": [began.train.steps, steps]} | {
        f"optimizer.{key}": [getattr(began.optimizer, key), getattr(optimizer, key)] for key in keys
    }
    changed = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    return RateChange(saved.step, before, after, changed)
