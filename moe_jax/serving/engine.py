"""Many requests at once over one model: each takes a slot, and they join and leave between steps.

    engine = ServingEngine(loaded, EngineSize(max_batch=32, context=4096))
    engine.start()
    stream = engine.submit(Request(prompt=(1, 5, 9), max_tokens=50))
    for event in stream: ...                   # Token, Token, ..., Finished
    engine.drain()

One thread runs the steps. A step takes in a waiting request if there are a slot and room in the
cache for its prompt, reads at most one chunk of one prompt, decodes one token of every running
request and draws the next of each. A running stream thus waits for one chunk and one step at most.
Prompts are read in the order in which they came. After `start` nothing is compiled:
`EngineStats.compilations` counts.

Where the blocks of the cache run out, the request that came last gives up its own and waits: later
it is read and generated anew, by the same programs, up to where it was, and nobody sees a
difference. The request that came first is thus never held up.

What a request gives does not depend on what else runs (device_state.py says why): its draws are
numbered by its own seed and tokens, as those of `moe-jax generate` are.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from moe_jax.errors import UserError
from moe_jax.inference.session import LoadedModel
from moe_jax.profiling.clock import compile_clock
from moe_jax.serving.cache_blocks import CacheBlocks
from moe_jax.serving.device_state import DeviceState, cache_kinds, num_ids
from moe_jax.serving.engine_size import EngineSize
from moe_jax.serving.expert_balance import ExpertBalance
from moe_jax.serving.lockstep import dismiss, leading
from moe_jax.serving.request import EngineStats, Finished, Request
from moe_jax.serving.stream import TokenStream
from moe_jax.serving.text_row import TextRow, Waiting
from moe_jax.serving.warm_up import warm_up

STOPPED = "The server was stopped."
DRAINING = "The server is draining: it takes no further requests."
COUNT_EVERY = 64  # steps between two readings of the experts' load, which wait for the devices


class ServingEngine:
    """See above. `submit`, `stats`, `drain` and `stop` may be called from any thread."""

    def __init__(self, loaded: LoadedModel, size: EngineSize):
        """Raises UserError where the model cannot be served like this."""
        self._loaded, self.size = loaded, size
        self.context, self.max_batch = size.context, size.max_batch
        self._state = leading(DeviceState(loaded, size))
        self.num_ids = num_ids(loaded)
        self._widths: tuple[int, ...] = (size.max_batch,)
        kinds = cache_kinds(loaded.engine.plan)
        self._blocks = CacheBlocks(size, kinds.window, kinds.full, self._state.place)
        self._numbers = itertools.count()
        self._changed = threading.Condition()  # guards what other threads see
        self._waiting: deque[Waiting] = deque()
        self._rows: dict[int, TextRow] = {}  # by slot
        self._read_next: TextRow | None = None  # the prompt under way
        self._accepts, self._stops = True, False
        self._failure: str | None = None
        self._thread: threading.Thread | None = None
        self._compilations = 0
        self._step_seconds = 0.0  # of the newest step
        self._busy_since: float | None = None  # or since the last step; None where all is done
        self._steps = self._prompt_tokens = self._generation_tokens = 0
        self._prefix_query_tokens = self._prefix_hit_tokens = self._preemptions = 0
        self._experts: ExpertBalance | None = None
        if (counts := self._state.expert_counts()) is not None:
            placement, budget = self._state.placement, self._state.move_budget
            self._experts = ExpertBalance(placement, size.balance_every, budget)
            self._experts.read(counts)

    @property
    def failed(self) -> str | None:
        """What went wrong, in a sentence, where the engine ended by an error of its own."""
        return self._failure

    def start(self) -> None:
        """Compiles every program, and begins to serve."""
        compile_clock()
        self._widths = warm_up(self._state)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, notify: Callable[[], None] | None = None) -> TokenStream:
        """Queues a request. `notify` is called, on the engine's thread, where its stream has news.

        Raises UserError for a prompt that is empty, too long, or of tokens that the model does not
        have, and where the engine takes no requests any more.
        """
        self._check(request)
        stream = TokenStream(notify, self._wake)
        with self._changed:
            if not self._accepts:
                raise UserError(self._failure or (STOPPED if self._stops else DRAINING))
            if self._busy_since is None:
                self._busy_since = time.monotonic()
            now = time.monotonic()
            self._waiting.append(Waiting(next(self._numbers), request, stream, now, []))
            self._changed.notify_all()
        return stream

    def drain(self, seconds: float | None = None) -> bool:
        """Takes no further requests and waits until those that are there have ended; whether they
        have, within `seconds`. The engine has stopped then.
        """
        with self._changed:
            self._accepts = False
            done = self._changed.wait_for(lambda: not self._has_work() or self._stops, seconds)
        self.stop()
        return done

    def stop(self) -> None:
        """Ends all that runs and waits, now."""
        with self._changed:
            self._accepts, self._stops = False, True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        if self._experts is not None:
            self._experts.close()

    def dismiss(self) -> None:
        """Lets the other processes of `follow` go; where there are several, once, after `stop`."""
        dismiss(self._state)

    def stats(self) -> EngineStats:
        """What the engine does now, and has done."""
        cache = self._loaded.engine.expert_counts
        with self._changed:
            since, experts = self._busy_since, self._experts
            return EngineStats(
                running=len(self._rows),
                waiting=len(self._waiting),
                slots=self.max_batch,
                cache_use=self._blocks.in_use,
                preemptions=self._preemptions,
                prefix_query_tokens=self._prefix_query_tokens,
                prefix_hit_tokens=self._prefix_hit_tokens,
                prompt_tokens=self._prompt_tokens,
                generation_tokens=self._generation_tokens,
                steps=self._steps,
                compilations=self._compilations,
                step_seconds=0.0 if since is None else self._step_seconds,
                stalled_seconds=0.0 if since is None else time.monotonic() - since,
                expert_cache_hits=None if cache is None else int(cache.hits_L.sum()),
                expert_cache_misses=None if cache is None else int(cache.misses_L.sum()),
                expert_counts=None if experts is None else experts.choices_LE,
                experts=None if experts is None else experts.stats,
            )

    def _check(self, request: Request) -> None:
        if not request.prompt:
            raise UserError("The prompt is empty: give at least one token.")
        if len(request.prompt) > self.context:
            raise UserError(
                f"The prompt has {len(request.prompt)} tokens and the server's context "
                f"{self.context}: shorten it, or raise --max-context."
            )
        if request.max_tokens < 1:
            raise UserError(f"max_tokens {request.max_tokens} must be at least 1.")
        if min(request.prompt) < 0:
            raise UserError(f"The prompt has token {min(request.prompt)}: ids begin with 0.")
        self._loaded.engine.plan.check_tokens(max(request.prompt))

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _has_work(self) -> bool:
        return bool(self._waiting or self._rows)

    # What follows runs on the engine's thread alone; other threads see what changes under the lock.

    def _run(self) -> None:
        ending = STOPPED
        try:
            while self._work_to_do():
                self._step()
        except BaseException as error:
            ending = self._failure = f"The engine failed: {type(error).__name__}: {error}"
            raise
        finally:
            with self._changed:
                self._accepts, self._stops = False, True
                streams = [waiting.stream for waiting in self._waiting]
                streams += [row.stream for row in self._rows.values()]
                self._waiting.clear()
                self._rows.clear()
                self._busy_since = None
                self._changed.notify_all()
            for stream in streams:
                stream.put(Finished("error", ending))

    def _work_to_do(self) -> bool:
        """Waits until there is a step to make; False where the engine is to stop."""
        if not self._has_work() or self._steps % COUNT_EVERY == 0:
            self._read_choices()
        with self._changed:
            if not self._has_work():
                self._busy_since = None
                self._changed.notify_all()  # whoever drains
            self._changed.wait_for(lambda: self._has_work() or self._stops)
            return not self._stops

    def _step(self) -> None:
        programs, thread = compile_clock().programs, threading.get_ident()
        before, began = programs[thread], time.monotonic()
        self._drop_cancelled()
        self._move_experts()
        self._admit()
        ready = self._with_room()
        rows = [row for row in ready if row is not self._read_next]
        if rows:
            self._decode(rows)
        if (row := self._read_next) in ready and row is not None and self._read_chunk(row):
            rows.append(row)
        if rows:
            self._draw(rows)
        with self._changed:
            self._step_seconds = time.monotonic() - began
            self._steps += 1
            self._compilations += programs[thread] - before
            self._busy_since = time.monotonic()

    def _read_choices(self) -> None:
        if self._experts is not None:
            counts = self._state.expert_counts()
            with self._changed:
                self._experts.read(counts)

    def _move_experts(self) -> None:
        """Experts move where the load of late says so, a part of them between two steps."""
        experts = self._experts
        if experts is None or experts.half is None:
            return
        if self._steps and self._steps % experts.half == 0:
            counts = self._state.expert_counts()
            with self._changed:
                experts.observe(counts)
        with self._changed:
            table = experts.next_table()
        if table is None:
            return
        self._read_choices()  # these went by the table of now; nothing is under way any more
        began = time.monotonic()
        self._state.move_experts(table.physical_to_logical)
        with self._changed:
            experts.moved(table, time.monotonic() - began)

    def _drop_cancelled(self) -> None:
        dropped = []
        with self._changed:
            for waiting in [one for one in self._waiting if one.stream.cancelled]:
                self._waiting.remove(waiting)
                dropped.append(waiting.stream)
        for row in [row for row in self._rows.values() if row.stream.cancelled]:
            self._leave(row)
            dropped.append(row.stream)
        for stream in dropped:
            stream.put(Finished("cancelled"))

    def _leave(self, row: TextRow) -> None:
        """A row's slot is free, and its blocks."""
        if self._read_next is row:
            self._read_next = None
        self._blocks.end(row.slot)
        self._state.vacate(row.slot)
        with self._changed:
            del self._rows[row.slot]

    def _admit(self) -> None:
        """The next request takes a slot, if there are both, and room for its prompt, and no other
        prompt is under way.
        """
        with self._changed:
            free = [slot for slot in range(self.max_batch) if slot not in self._rows]
            if self._read_next is not None or not self._waiting or not free:
                return
            waiting = self._waiting[0]
            request, stream = waiting.request, waiting.stream
            if not self._blocks.fits(request.prompt, len(waiting.drawn)):
                return
            self._waiting.popleft()
            row = TextRow(free[0], waiting, self._loaded.eos_ids, self.num_ids)
            self._rows[row.slot] = self._read_next = row
        self._state.begin(row.slot, request, row.kind)
        row.length = self._blocks.begin(row.slot, request.prompt)
        if stream.queue_seconds is not None:  # it has had a slot before
            return
        stream.queue_seconds = time.monotonic() - waiting.since
        stream.cached_tokens = row.length
        with self._changed:
            self._prefix_query_tokens += len(request.prompt)
            self._prefix_hit_tokens += row.length
            self._prompt_tokens += len(request.prompt)

    def _with_room(self) -> list[TextRow]:
        """The rows that go on in this step: all that the cache has room for, the oldest first."""
        ready = []
        for row in sorted(self._rows.values(), key=lambda row: row.number):
            if self._rows.get(row.slot) is row and self._make_room(row):
                ready.append(row)
        return ready

    def _make_room(self, row: TextRow) -> bool:
        """Takes blocks for a row's next tokens, from younger rows where none are free."""
        end = row.length + (len(self._chunk(row)) if row is self._read_next else 1)
        while not self._blocks.extend(row.slot, row.length, end):
            youngest = max(self._rows.values(), key=lambda row: row.number)
            self._leave(youngest)
            with self._changed:
                self._waiting.appendleft(youngest.waiting)
                self._preemptions += 1
            if youngest is row:
                return False
        return True

    def _chunk(self, row: TextRow) -> tuple[int, ...]:
        """The tokens of a row's prompt that are read next."""
        return row.request.prompt[row.length : row.length + self.size.chunk]

    def _read_chunk(self, row: TextRow) -> bool:
        """Reads a chunk of a row's prompt; whether that was the last."""
        part = self._chunk(row)
        self._state.read_prompt(row.slot, part, row.length)
        row.length += len(part)
        self._blocks.keep(row.slot, row.length)
        if row.length < len(row.request.prompt):
            return False
        self._read_next = None
        return True

    def _slots_of(self, rows: list[TextRow]) -> int:
        """How many of the first slots a step runs over, so that these rows are among them."""
        last = max(row.slot for row in rows)
        return next(width for width in self._widths if width > last)

    def _decode(self, rows: list[TextRow]) -> None:
        token_S, start_S, length_S = np.zeros((3, self._slots_of(rows)), np.int32)
        for row in rows:
            token_S[row.slot], start_S[row.slot], length_S[row.slot] = row.newest, row.length, 1
            row.length += 1
        self._state.decode(token_S, start_S, length_S)

    def _draw(self, rows: list[TextRow]) -> None:
        """Draws the next token of these rows, and hands them out."""
        drawn_S = np.zeros(self._slots_of(rows), np.int32)
        for row in rows:
            drawn_S[row.slot] = row.tokens
        masks = {row.slot: row.allowed() for row in rows}
        allowed = {slot: mask for slot, mask in masks.items() if mask is not None}
        token_S = self._state.draw({row.slot: row.kind for row in rows}, drawn_S, allowed)
        top = self._state.top(token_S) if any(row.wants_top for row in rows) else None
        for row in rows:
            events = row.take(int(token_S[row.slot]), top, self.context)
            ended = bool(events) and isinstance(events[-1], Finished)
            with self._changed:
                self._generation_tokens += len(events) - ended
            if ended:
                self._leave(row)
            if events:
                row.stream.put(*events)
