"""What came of a training job."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.data.corpus import SamplePrompt
from moe_jax.tracking.history import History, read_history
from moe_jax.tracking.metrics import FILE_NAME, iter_metrics


class TrainingResult(NamedTuple):
    """What came of a training job."""

    directory: Path
    step: int  # the last one done
    stopped: bool  # by a signal, before the last step asked for
    report: Path | None  # of this process; only the first draws it, of a run with training lines
    sample_fits: bool  # whether the parameters can be brought onto one device to draw a sample
    # of the sample, if the configuration has none; None where all steps had been done before
    sample_prompt: SamplePrompt | None = None

    def records(self) -> list[dict[str, Any]]:
        """All lines of the run's metrics.jsonl (docs/metrics.md)."""
        return list(iter_metrics(self.directory / FILE_NAME))

    def history(self) -> History:
        """Its training and validation lines as columns."""
        return read_history(self.directory / FILE_NAME)
