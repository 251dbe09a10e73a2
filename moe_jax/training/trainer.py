"""The training job: `train` reads top to bottom as a run does.

    from moe_jax.config.load import load_config
    result = train(load_config("configs/tiny.yaml", []), Path("runs/tiny"))
    result.history().column("loss")

On accelerators the loop does not wait for the device: it starts step after step, and fetches what
they measured when a line is due, when experts may move, and when a signal came. Simulated devices
are awaited after each step, because they share one pool of threads: with two programs under way,
devices of one may hold the threads that the other's collectives wait for, and nothing goes on
(docs/log.md).

Signals are noted by a handler of ours and seen between steps; several processes take one up at the
same step (requests.py). Orbax's PreemptionCheckpointingPolicy and
`multihost_utils.reached_preemption_sync_point` know SIGTERM alone, and of a single process nothing.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax import __version__
from moe_jax.checkpoint.manager import Checkpoints
from moe_jax.config.load import dump_config
from moe_jax.config.schema import Config
from moe_jax.data.packing import Batches, HostBatch
from moe_jax.data.run_corpus import TrainingCorpus, read_corpus
from moe_jax.errors import UserError
from moe_jax.models.layer_pattern import count_moe_layers, layer_kinds, routes_by_sequence
from moe_jax.parallel.mesh import make_mesh
from moe_jax.placement.table import Placement
from moe_jax.placement.topology import Topology
from moe_jax.profiling import flops as measure
from moe_jax.profiling import machine, memory
from moe_jax.runtime.devices import use_devices
from moe_jax.runtime.distributed import is_first, process_count, process_index
from moe_jax.runtime.platform import platform_of
from moe_jax.runtime.signals import SAVE_SIGNALS, collected_signals, noted_signals
from moe_jax.tracking import run_dir
from moe_jax.tracking.alerts import Alerts
from moe_jax.tracking.environment import describe_environment
from moe_jax.tracking.metrics import FILE_NAME, MetricsWriter, iter_metrics
from moe_jax.tracking.phases import Phases
from moe_jax.tracking.report import write_report
from moe_jax.tracking.run_lock import check_shared, locked
from moe_jax.tracking.traffic import write_traffic
from moe_jax.training import continuation, initial_state, restore
from moe_jax.training.pending_steps import FetchedSteps, PendingSteps, StepClock
from moe_jax.training.placement import initial
from moe_jax.training.placement.replanner import Replanner
from moe_jax.training.progress import RunProgress
from moe_jax.training.records import LinkTraffic, keep_held_out, placement_sentence, training_record
from moe_jax.training.requests import Requests
from moe_jax.training.result import TrainingResult
from moe_jax.training.state import StepStats, TrainState
from moe_jax.training.step import TrainProgram
from moe_jax.utils.progress import say

# Bytes of parameters above which no sample is drawn on one device at the end.
SAMPLE_LIMIT = 2 << 30
COUNT_LIMIT = 2**31 - 1  # of routing counts that the device sums up in int32


def train(
    config: Config,
    directory: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    fallback: bool = False,
) -> TrainingResult:
    """Trains `config` into `directory`, resuming a run there if asked; prints progress and draws
    the report.

    Ctrl-C and SIGTERM end the run after the step under way, with a checkpoint; `SAVE_SIGNALS` save
    one and the run goes on. Raises UserError for what the user can correct, before anything is
    compiled or written where possible, and for a directory that another process trains into.
    """
    origin = initial_state.Origin(config, directory)
    config = initial_state.resolve(config, directory, origin, resume=resume)
    _tell_constant_weight(config)
    with (
        _claimed(directory, config, resume=resume, overwrite=overwrite),
        collected_signals(*SAVE_SIGNALS) as save_requests,
        Phases(
            directory, process_index(), process_count(), hang_timeout=config.train.hang_timeout
        ) as phases,
    ):
        use_devices(config.devices, config.mesh)
        mesh = make_mesh(config.mesh)
        checkpoints = Checkpoints(
            directory / "checkpoints", config.checkpoint.keep_last, config.checkpoint.keep_best
        )
        saved = restore.find_saved(checkpoints, fallback) if resume else None
        if saved is not None and saved.step >= config.train.steps and not fallback:
            continuation.check_steps(saved.step, config.train.steps, directory)
            return _end_at_once(checkpoints, saved.step, directory)
        tokenizer = config.data.tokenizer
        if resume:
            tokenizer = continuation.own_tokenizer(directory, config.data)
        if resume and saved is None:
            print(f"--resume: there is no checkpoint in {directory} yet: beginning at step 0.")
        corpus = read_corpus(config.model, config.data, config.train, tokenizer)
        if saved is not None:
            continuation.check_corpus(saved, corpus, config.data)
        rows = config.train.global_batch, process_index(), process_count()
        batches = corpus.train_batches(*rows)
        held_out = corpus.validation_batches(rows[0], config.train.eval_batches, *rows[1:])
        topology = initial.mesh_topology(config, mesh)
        vocab_size = initial_state.vocabulary(config, corpus)
        program = make_program(config, vocab_size, mesh, topology, saved)
        trainer = Trainer(
            config=config,
            directory=directory,
            program=program,
            replanner=Replanner(config.placement, topology, program),
            checkpoints=checkpoints,
            corpus=corpus,
            batches=batches,
            save_requests=save_requests,
            phases=phases,
        )
        if saved is None:
            state = initial_state.first_state(program, config, origin)
        else:
            state = trainer.restore(saved, fallback=fallback)
        environment = trainer.measure(state)
        if is_first():
            if overwrite and not resume:
                run_dir.clear(directory)
            run_dir.write_description(directory, config, environment)
            run_dir.keep_tokenizer(directory, tokenizer)
            if saved is None:
                initial_state.keep_hf_config(directory, config, origin)
        return trainer.run(state, held_out)


@contextmanager
def _claimed(directory: Path, config: Config, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Holds the run's directory, which the first process has checked and all can see."""
    if is_first():
        run_dir.claim(directory, config, resume=resume, overwrite=overwrite)
    with locked(directory, active=is_first()):
        if is_first():
            # Once more: meanwhile another process may have begun a run here, and ended.
            run_dir.claim(directory, config, resume=resume, overwrite=overwrite)
        check_shared(directory)
        yield


def _tell_constant_weight(config: Config) -> None:
    if config.moe.weight_is_constant and count_moe_layers(config.model, config.moe):
        say(
            "moe.top_k=1 with moe.normalize=after: the weight of a token's one expert is always 1, "
            "so the router learns nothing from what its experts give; with moe.normalize=before "
            "it does."
        )


def _end_at_once(checkpoints: Checkpoints, step: int, directory: Path) -> TrainingResult:
    """The result of a resumed run that has done all its steps already."""
    checkpoints.verify(step)
    print(
        f"{directory}: all {step} steps are done. To go on, give more: --set "
        f"train.steps={2 * step}."
    )
    metrics = directory / FILE_NAME  # of a resized run without a line; a copy may lack it
    drawable = metrics.exists() and any("loss" in line for line in iter_metrics(metrics))
    return TrainingResult(
        directory=directory,
        step=step,
        stopped=False,
        report=write_report(directory) if drawable and is_first() else None,
        sample_fits=False,
        sample_prompt=None,
    )


def make_program(
    config: Config, vocab_size: int, mesh: Mesh, topology: Topology, saved: restore.SavedRun | None
) -> TrainProgram:
    """The steps to be compiled. Raises UserError where the state does not fit the devices."""
    program = TrainProgram(
        config.model,
        config.moe,
        config.optimizer,
        mesh,
        initial.first_placement(config, topology, saved),
        vocab_size=vocab_size,
        steps=config.train.steps,
        accumulation=config.train.accumulation,
        hosts=len(np.unique(topology.host_of_rank(config.mesh.expert, config.mesh.tensor))),
    )
    initial.check_state_memory(topology, program)
    return program


class Trainer:
    """The loop of training steps, and what it keeps between them."""

    matmul_rate: float  # FLOP/s of the mesh, once it is measured
    writer: MetricsWriter  # while it runs
    progress: RunProgress

    def __init__(
        self,
        *,
        config: Config,
        directory: Path,
        program: TrainProgram,
        replanner: Replanner,
        checkpoints: Checkpoints,
        corpus: TrainingCorpus,
        batches: Batches,
        save_requests: list[signal.Signals],
        phases: Phases,
    ):
        self.config, self.directory, self.program = config, directory, program
        self.replanner, self.checkpoints = replanner, checkpoints
        self.corpus, self.batches, self.phases = corpus, batches, phases
        self.save_requests = save_requests  # signals come in here
        self.rate_change: continuation.RateChange | None = None
        self.links, self.alerts = LinkTraffic(), Alerts(config.monitor)
        self.pending, self.clock = PendingSteps(), StepClock()
        kinds = layer_kinds(config.model, config.moe)
        self.moe_layers = [i for i, kind in enumerate(kinds) if kind.moe]
        self.tokens = config.train.global_batch * measure.sequence_tokens(
            config.model, config.train.seq_len
        )
        rows = config.train.global_batch // process_count()
        self.first_sequence = process_index() * rows
        self.awaits_steps = platform_of(program.mesh.devices.flat[0]).simulated
        self.max_pending = max(COUNT_LIMIT // (self.tokens * config.moe.top_k), 1)
        self.loss_unit = "(quantile loss)" if config.model.forecasts else "nats a token"
        self.evaluated = False
        self.skipped = 0  # steps that metrics.jsonl has told of

    def restore(self, saved: restore.SavedRun, *, fallback: bool) -> TrainState:
        """The state of a checkpoint, with what else the run goes on from."""
        config = self.config
        self.phases.enter("restore", saved.step)
        restored = restore.restore_state(
            self.checkpoints, self.program, step=None, fallback=fallback, known=saved
        )
        for problem in restored.skipped:
            print(f"Passed over a damaged checkpoint: {problem}.")
        continuation.check_steps(restored.step, config.train.steps, self.directory)
        if restored.step != saved.step:  # an earlier one, because that one is damaged
            placement = Placement.from_json(restored.meta["placement"])
            saved = restore.SavedRun(restored.step, restored.meta, placement)
        self.replanner.restore(saved.meta.get("replanning"), saved.placement)
        self.batches.set_state(saved.meta["data"])
        self.rate_change = continuation.rate_change(saved, config.optimizer, config.train.steps)
        self.phases.enter("start", restored.step)
        return restored.state

    def measure(self, state: TrainState) -> dict[str, Any]:
        """Measures and counts what environment.json describes."""
        config, program = self.config, self.program
        rate, shape = machine.matmul_rate(jnp.dtype(config.model.compute_dtype), config.mesh.size)
        total, active = measure.parameter_counts(config.model, config.moe, program.vocab_size)
        empty = program.placement.empty_slots
        if empty:
            print(
                f"{empty} of the {program.placement.num_slots} slots per layer on "
                f"mesh.expert={config.mesh.expert} devices begin empty."
            )
        self.matmul_rate = rate
        return describe_environment(
            config,
            corpus_hash=self.corpus.hash,
            matmul_flops_per_second=rate,
            matmul_shape=shape,
            matmul_dtype=config.model.compute_dtype,
            parameters={"total": total, "active": active},
            bytes_per_device=memory.bytes_per_device(state),
            empty_slots_per_layer=empty,
        )

    def run(self, state: TrainState, held_out: list[HostBatch]) -> TrainingResult:
        """Steps until the last one, or until a signal; raises UserError when too many in a row were
        not finite.
        """
        config, start = self.config, int(state.step)
        steps, self.skipped = config.train.steps, int(state.skipped)
        validation = [self.program.shard(batch, self.first_sequence) for batch in held_out]
        # A run that was killed before its first line, or never began, has no file to go on with.
        before = start if start or (self.directory / FILE_NAME).exists() else None
        self.writer = MetricsWriter(self.directory, before, active=is_first())
        step = start
        with (
            noted_signals(signal.SIGINT, signal.SIGTERM) as signals,
            closing(self.writer),
            self.checkpoints,
            RunProgress(steps, start, self.loss_unit) as self.progress,
        ):
            requests = Requests(self.save_requests, signals)
            if start:
                self._tell_resumed(start)
            for step in range(start + 1, steps + 1):
                first = step == start + 1  # compiles, so its time is not the others'
                self.pending.start()
                self.phases.enter("data", step)
                batch = self.program.shard(next(self.batches), self.first_sequence)
                self.phases.enter("compile" if first else "step", step)
                state, stats = self.program.train_step(state, batch)
                self.pending.add(stats)
                if not (first or self._must_fetch(step) or requests.waiting()):
                    continue
                fetched = self.pending.fetch()
                state = self._observe(step, state, fetched, timed=not first)
                asked = requests.take(step)
                in_row = int(fetched.stats.skipped_in_row)
                broken = in_row >= config.train.max_skipped
                saves = bool(asked.saves) or asked.stops or broken
                if asked.saves:
                    names = ", ".join(asked.saves)
                    self.progress.say(f"step {step}: {names} came: saving, and going on.")
                if self._logs(step) or saves:
                    self._record(step, state, fetched.stats, validation, saves)
                if broken:
                    raise _not_finite(step, in_row)
                if asked.stops:
                    break
        return self._end(step)

    def _tell_resumed(self, start: int) -> None:
        event = {"step": start, "event": "resumed", "matmul_flops_per_second": self.matmul_rate}
        self.writer.write(event)
        self.progress.say(f"Resuming {self.directory} after step {start}.")
        if self.rate_change is not None:
            self.writer.write(self.rate_change.event())
            self.progress.say(self.rate_change.sentence())
        lines = iter_metrics(self.directory / FILE_NAME) if is_first() else ()
        for line in lines:  # so that what has been raised is not raised again
            if "layers" in line and "event" not in line:
                self.alerts.check(line)

    def _evaluates(self, step: int) -> bool:
        return step % self.config.train.eval_every == 0 or step == self.config.train.steps

    def _saves(self, step: int) -> bool:
        return step % self.config.checkpoint.every == 0 or step == self.config.train.steps

    def _logs(self, step: int) -> bool:
        """Whether the step has a training line."""
        every = self.config.train.log_every
        return step % every == 0 or self._evaluates(step) or self._saves(step)

    def _must_fetch(self, step: int) -> bool:
        """Whether what the pending steps measured is needed on the host now.

        `train.max_skipped` is only looked at then: a run that has recovered meanwhile goes on, and
        steps that were not finite have changed nothing.
        """
        pending = self.pending.steps
        if self.awaits_steps or self._logs(step) or pending >= self.max_pending:
            return True
        last = self.config.train.steps
        return bool(self.moe_layers) and self.replanner.must_observe(step, last, pending)

    def _observe(
        self, step: int, state: TrainState, fetched: FetchedSteps, *, timed: bool
    ) -> TrainState:
        """Counts the time and the traffic of fetched steps; moves experts where that is due."""
        self.clock.add(fetched.seconds, fetched.steps)
        if fetched.counts is None:
            return state
        self.links.add(fetched.counts, fetched.steps)
        seconds = fetched.seconds if timed else None
        self.replanner.observe(fetched.counts, fetched.steps, seconds)
        if self.replanner.due(step, self.config.train.steps):
            self.phases.enter("migration", step)
        state, events = self.replanner.replan(step, state, self.config.train.steps)
        for event in events:
            self.writer.write(event)
            self.progress.say(placement_sentence(event))
        return state

    def _record(
        self, step: int, state: TrainState, stats: StepStats, validation: list[Any], saves: bool
    ) -> None:
        """Writes a step's lines and, with `saves` or where one is due, a checkpoint."""
        record = self._training_line(step, stats)
        evaluates, saves = self._evaluates(step), self._saves(step) or saves
        if (evaluates or saves) and self.moe_layers:
            self.writer.write(self.links.take_event(step, self.moe_layers))
        val_loss = None
        if evaluates:
            line = self._validate(step, state, validation)
            val_loss = line["val_loss"]
            self.writer.write(line)
            self.progress.validation(line, record["layers"])
        if saves:
            self._save(step, state, val_loss)

    def _training_line(self, step: int, stats: StepStats) -> dict[str, Any]:
        """Writes and shows a step's training line, and the alerts that it raises."""
        model, moe = self.config.model, self.config.moe
        flops = measure.TRAINING * measure.model_flops(
            model, moe, self.program.vocab_size, self.config.train.seq_len
        )
        record = training_record(
            step,
            stats,
            self.clock.take_mean(),
            tokens=self.tokens,
            model_flops=self.tokens * flops / self.matmul_rate,
            layers=self.moe_layers,
        )
        skipped = int(stats.skipped)
        if skipped > self.skipped:
            event = {"step": step, "event": "skipped_step", "count": skipped - self.skipped}
            self.writer.write(event)
            self.skipped = skipped
        self.writer.write(record)
        self.progress.train(record)
        for alert in self.alerts.check(record):
            self.writer.write(alert)
            self.progress.say(alert["text"])
        return record

    def _validate(self, step: int, state: TrainState, batches: list[Any]) -> dict[str, Any]:
        began = time.perf_counter()
        sums = []
        if self.config.model.forecasts:
            self.phases.enter("evaluation" if self.evaluated else "compile", step)
            keep_held_out(self.directory, self.program, state, batches[0])
        for number, batch in enumerate(batches):
            compiled = self.evaluated or number
            self.phases.enter("evaluation" if compiled else "compile", step)
            sums.append(jax.device_get(self.program.eval_step(state.params, state.tables, batch)))
        self.evaluated = True
        loss, tokens = np.sum(np.array(sums, np.float64), axis=0)
        return {
            "step": step,
            "val_loss": float(loss / tokens),
            "val_tokens": int(tokens),
            "val_seconds": time.perf_counter() - began,
        }

    def _save(self, step: int, state: TrainState, val_loss: float | None) -> None:
        # Its line is written before the save, so that the lines up to a checkpoint are whole
        # whenever it counts.
        self.phases.enter("checkpoint", step)
        self.writer.write({"step": step, "event": "checkpoint"})
        if self.moe_layers and is_first():
            window = self.replanner.longer_window()
            write_traffic(self.directory, step, window.steps, window.traffic_LRE, self.moe_layers)
        meta = {
            "version": __version__,
            "config": dump_config(self.config),
            "data": self.batches.get_state(),
            "corpus_hash": self.corpus.hash,
            "tokenizer_hash": self.corpus.tokenizer_hash,
            "placement": self.replanner.placement.to_json(),
            "replanning": self.replanner.to_json(),
        }
        self.checkpoints.save(step, state, meta, val_loss)

    def _end(self, step: int) -> TrainingResult:
        """Draws the report."""
        self.phases.enter("end", step)
        whole = routes_by_sequence(self.config.model, self.config.moe)  # so it writes no text
        params = jax.tree.leaves(self.program.abstract_state.params)
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in params)
        return TrainingResult(
            directory=self.directory,
            step=step,
            stopped=step < self.config.train.steps,
            report=write_report(self.directory) if is_first() else None,
            sample_fits=process_count() == 1 and size <= SAMPLE_LIMIT,
            sample_prompt=None if whole else self.corpus.sample_prompt(),
        )


def _not_finite(step: int, in_row: int) -> UserError:
    return UserError(
        f"The loss or the gradients were not finite in {in_row} steps in a row "
        f"(train.max_skipped), up to step {step}: the state before "
        f"them is in the checkpoint of step {step}; lower optimizer.learning_rate and go on with "
        f"--resume."
    )
