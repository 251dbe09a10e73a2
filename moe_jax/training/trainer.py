"""The training job: `train` reads top to bottom as a run does.

from moe_jax.config import load_config
train(load_config("configs/tiny.yaml", []), Path("runs/tiny"))
"""

from __future__ import annotations

import dataclasses
import signal
import time
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import __version__
from moe_jax.checkpoint import expert_layout
from moe_jax.checkpoint.manager import Checkpoints
from moe_jax.config.load import dump_config
from moe_jax.config.schema import Config
from moe_jax.data.corpus import Corpus, load_corpus
from moe_jax.errors import UserError
from moe_jax.models.layer_pattern import layer_kinds
from moe_jax.parallel.mesh import make_mesh
from moe_jax.placement.table import Placement
from moe_jax.profiling import flops as measure
from moe_jax.profiling import machine, memory
from moe_jax.runtime.devices import use_devices
from moe_jax.runtime.signals import noted_signals
from moe_jax.tracking import environment, run_dir
from moe_jax.tracking.alerts import Alerts
from moe_jax.tracking.metrics import FILE_NAME, MetricsWriter, iter_metrics
from moe_jax.tracking.report import write_report
from moe_jax.tracking.traffic import write_traffic
from moe_jax.training import initial_placement, initial_state, restore
from moe_jax.training.progress import RunProgress
from moe_jax.training.records import Links, training_record
from moe_jax.training.replanner import Replanner, sentence
from moe_jax.training.state import StepStats, TrainState
from moe_jax.training.step import TrainProgram

SAMPLE_LIMIT = (
    2 << 30
)  # bytes of parameters above which no sample is drawn on one device at the end


class Result(NamedTuple):
    """What came of a training job."""

    directory: Path
    step: int  # the last one done
    stopped: bool  # by a signal, before the last step asked for
    report: Path | None  # of this process; only the first one draws it
    sample_fits: bool  # whether the parameters can be brought onto one device to draw a sample


def train(
    config: Config,
    directory: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    fallback: bool = False,
) -> Result:
    """Trains `config` into `directory`, resuming a run there if asked; prints progress and draws
    the report.

    Ctrl-C and SIGTERM end the run after the step under way, with a checkpoint. Raises UserError for
    whatever the user can mend, before anything is compiled or written where possible.
    """
    use_devices(config.devices)
    mesh = make_mesh(config.mesh)
    config = initial_state.resolve(config, directory, resume=resume)
    run_dir.claim(directory, config, resume=resume, overwrite=overwrite)
    tokenizer = run_dir.run_tokenizer(directory, config) if resume else config.data.tokenizer
    corpus = load_corpus(
        dataclasses.replace(config.data, tokenizer=tokenizer),
        config.train.seq_len,
        config.train.seed,
    )
    vocab_size = initial_state.vocabulary(config, corpus)
    processes = (jax.process_index(), jax.process_count())
    batches = corpus.train_batches(config.train.global_batch, *processes)
    held_out = corpus.validation_batches(
        config.train.global_batch, config.train.eval_batches, *processes
    )

    checkpoints = Checkpoints(
        directory / "checkpoints", config.checkpoint.keep_last, config.checkpoint.keep_best
    )
    kept = expert_layout.saved_meta(checkpoints, None, fallback) if resume else None
    saved = None if kept is None else Placement.from_json(kept["placement"])
    topology = initial_placement.mesh_topology(config, mesh)
    placement = initial_placement.first_placement(
        config, topology, saved, None if kept is None else kept.get("replanning")
    )
    program = TrainProgram(
        config.model,
        config.moe,
        config.optimizer,
        mesh,
        placement,
        vocab_size=vocab_size,
        steps=config.train.steps,
        accumulation=config.train.accumulation,
        hosts=len(np.unique(topology.host_of_rank(config.mesh.expert, config.mesh.tensor))),
    )
    initial_placement.check_state_memory(topology, program)
    replanner = Replanner(config.placement, topology, program)
    if saved is None:
        state = initial_state.first_state(program, config)
    else:
        restored = restore.restore_state(checkpoints, program, step=None, fallback=fallback)
        for problem in restored.skipped:
            print(f"Passed over a damaged checkpoint: {problem}.")
        _check_corpus(restored.meta, corpus)
        if restored.step > config.train.steps:
            raise UserError(
                f"train.steps={config.train.steps} but the run in {directory} has done "
                f"{restored.step}: give more steps."
            )
        state = restored.state
        replanner.restore(
            restored.meta.get("replanning"), Placement.from_json(restored.meta["placement"])
        )
        batches.set_state(restored.meta["data"])

    environment = _environment(config, corpus, program, state, vocab_size)
    if overwrite and not resume:
        run_dir.clear(directory)
    run_dir.write_description(directory, config, environment)
    if saved is None:
        initial_state.keep(directory, config)
    return _Job(
        config, directory, program, replanner, checkpoints, corpus, environment, held_out
    ).run(state, batches)


class _Job:
    """The loop and what it keeps between steps."""

    def __init__(
        self,
        config: Config,
        directory: Path,
        program: TrainProgram,
        replanner: Replanner,
        checkpoints: Checkpoints,
        corpus: Corpus,
        environment: dict[str, Any],
        held_out: list[dict[str, np.ndarray]],
    ):
        self.config, self.directory, self.program = config, directory, program
        self.replanner, self.checkpoints, self.corpus, self.environment = (
            replanner,
            checkpoints,
            corpus,
            environment,
        )
        self.links, self.alerts = Links(), Alerts(config.monitor)
        rows = len(held_out[0]["tokens"])
        self.first_sequence = jax.process_index() * rows
        self.held_out = [program.shard(batch, self.first_sequence) for batch in held_out]
        self.moe_layers = [
            i for i, kind in enumerate(layer_kinds(config.model, config.moe)) if kind.moe
        ]
        self.tokens = config.train.global_batch * config.train.seq_len
        flops = measure.TRAINING * measure.model_flops(
            config.model, config.moe, program.vocab_size, config.train.seq_len
        )
        self.model_flops = self.tokens * flops / environment["matmul_flops_per_second"]
        self.skipped = 0

    def run(self, state: TrainState, batches: Any) -> Result:
        """Steps until the last one, or until a signal; raises UserError when too many in a row were
        not finite.
        """
        config, start = self.config, int(state.step)
        steps = config.train.steps
        self.skipped = int(state.skipped)
        # A run that was killed before its first line, or never began, has no file to go on with.
        before = start if start or (self.directory / FILE_NAME).exists() else None
        writer = MetricsWriter(self.directory, before, active=jax.process_index() == 0)
        stopping = False
        with (
            noted_signals(signal.SIGINT, signal.SIGTERM) as signals,
            closing(writer),
            closing(self.checkpoints),
            RunProgress(steps, start) as progress,
        ):
            if start:
                rate = self.environment["matmul_flops_per_second"]
                writer.write({"step": start, "event": "resumed", "matmul_flops_per_second": rate})
                progress.say(f"Resuming {self.directory} after step {start}.")
                lines = iter_metrics(self.directory / FILE_NAME) if jax.process_index() == 0 else ()
                for line in lines:  # so that what has been raised is not raised again
                    if "layers" in line and "event" not in line:
                        self.alerts.check(line)
            seconds, since = 0.0, 0
            for step in range(start + 1, steps + 1):
                began = time.perf_counter()
                state, figures = self.program.train_step(
                    state, self.program.shard(next(batches), self.first_sequence)
                )
                # Waits, so that the time is the step's, a signal during it is seen below, and no
                # two steps are under way at once, which simulated devices can wait in for ever (see
                # checksum_texts).
                figures = jax.device_get(figures)
                took = time.perf_counter() - began
                seconds, since = seconds + took, since + 1
                state = self._place(
                    writer, progress, step, state, figures, None if step == start + 1 else took
                )
                stopping, broken = (
                    bool(signals),
                    int(figures.skipped_in_row) >= config.train.max_skipped,
                )
                evaluates = step % config.train.eval_every == 0 or step == steps
                saves = step % config.checkpoint.every == 0 or step == steps or stopping or broken
                if not (step % config.train.log_every == 0 or evaluates or saves):
                    continue
                record = training_record(
                    step,
                    figures,
                    seconds / since,
                    tokens=self.tokens,
                    model_flops=self.model_flops,
                    layers=self.moe_layers,
                )
                seconds, since = 0.0, 0
                self._note_skips(writer, step, figures)
                writer.write(record)
                progress.train(record)
                for alert in self.alerts.check(record):
                    writer.write(alert)
                    progress.say(alert["text"])
                if (evaluates or saves) and self.moe_layers:
                    writer.write(self.links.event(step, self.moe_layers))
                val_loss = None
                if evaluates:
                    validation = self._validate(step, state)
                    val_loss = validation["val_loss"]
                    writer.write(validation)
                    progress.validation(validation, record["layers"])
                if saves:
                    # Written before the save, so that the lines up to a checkpoint are whole
                    # whenever it counts.
                    writer.write({"step": step, "event": "checkpoint"})
                    if self.moe_layers and jax.process_index() == 0:
                        window = self.replanner.load_window()
                        write_traffic(
                            self.directory, step, window.steps, window.traffic_LRE, self.moe_layers
                        )
                    self.checkpoints.save(step, state, self._meta(batches), val_loss)
                if broken:
                    raise _not_finite(step, int(figures.skipped_in_row))
                if stopping:
                    break
        return self._end(step)

    def _place(
        self,
        writer: MetricsWriter,
        progress: RunProgress,
        step: int,
        state: TrainState,
        figures: StepStats,
        seconds: float | None,
    ) -> TrainState:
        """Counts a step's traffic; moves experts where it is time to and pays, and tells of it."""
        layers = figures.figures.layers
        if layers is None:
            return state
        self.links.add(layers.counts)
        self.replanner.observe(layers.counts, seconds)
        state, events = self.replanner.turn(step, state, self.config.train.steps)
        for event in events:
            writer.write(event)
            progress.say(sentence(event))
        return state

    def _validate(self, step: int, state: TrainState) -> dict[str, Any]:
        began = time.perf_counter()
        sums = [
            jax.device_get(self.program.eval_step(state.params, state.tables, batch))
            for batch in self.held_out
        ]
        loss, tokens = np.sum(np.array(sums, np.float64), axis=0)
        return {
            "step": step,
            "val_loss": float(loss / tokens),
            "val_tokens": int(tokens),
            "val_seconds": time.perf_counter() - began,
        }

    def _meta(self, batches: Any) -> dict[str, Any]:
        """What a checkpoint holds besides arrays."""
        return {
            "version": __version__,
            "config": dump_config(self.config),
            "data": batches.get_state(),
            "corpus_hash": self.corpus.hash,
            "placement": self.replanner.placement.to_json(),
            "replanning": self.replanner.to_json(),
        }

    def _note_skips(self, writer: MetricsWriter, step: int, figures: StepStats) -> None:
        if int(figures.skipped) > self.skipped:
            writer.write(
                {
                    "step": step,
                    "event": "skipped_step",
                    "count": int(figures.skipped) - self.skipped,
                }
            )
            self.skipped = int(figures.skipped)

    def _end(self, step: int) -> Result:
        """Draws the report."""
        size = sum(
            leaf.size * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(self.program.abstract_state.params)
        )
        report = write_report(self.directory) if jax.process_index() == 0 else None
        fits = jax.process_count() == 1 and size <= SAMPLE_LIMIT
        return Result(self.directory, step, step < self.config.train.steps, report, fits)


def _not_finite(step: int, in_row: int) -> UserError:
    return UserError(
        f"The loss or the gradients were not finite in {in_row} steps in a row "
        f"(train.max_skipped), up to step {step}: the state before "
        f"them is in the checkpoint of step {step}; lower optimizer.learning_rate and go on with "
        f"--resume."
    )


def _check_corpus(meta: dict[str, Any], corpus: Corpus) -> None:
    if meta["corpus_hash"] != corpus.hash:
        raise UserError(
            f"data.source gives other text (hash {corpus.hash[:12]}) than the run began with "
            f"({meta['corpus_hash'][:12]}): restore "
            "the text (the built-in corpus changes with the Python version), or start another run."
        )


def _environment(
    config: Config, corpus: Corpus, program: TrainProgram, state: TrainState, vocab_size: int
) -> dict[str, Any]:
    """Measures and counts what environment.json describes."""
    rate, shape = machine.matmul_rate(jnp.dtype(config.model.compute_dtype), config.mesh.size)
    total, active = measure.parameter_counts(config.model, config.moe, vocab_size)
    empty = program.placement.empty_slots
    if empty:
        print(
            f"{empty} of the {program.placement.num_slots} slots a layer on "
            f"mesh.expert={config.mesh.expert} devices begin empty."
        )
    return environment.describe_environment(
        config,
        corpus_hash=corpus.hash,
        matmul_flops_per_second=rate,
        matmul_shape=shape,
        matmul_dtype=config.model.compute_dtype,
        parameters={"total": total, "active": active},
        bytes_per_device=memory.bytes_per_device(state),
        empty_slots_per_layer=empty,
    )
