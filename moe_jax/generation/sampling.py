"""Drawing the next token of each row from the model's logits, on the devices that hold them.

    sampler = Sampler([SamplingOptions(temperature=0.7, top_p=0.9, seed=1)], num_ids)
    sampler.begin(prompt_ids)
    token_B = sampler.draw(session.feed([prompt_ids]))     # numpy: only the tokens come to the host

Sampling is one compiled program behind the model's step and not a part of it: the step's logits
stay on the devices as its input. The engine then knows nothing of sampling, and other options
compile this small program and not the model. On a mesh the logits of a row are whole on each device
that has the row (`inference/output.py` gathers the vocabulary), so every device draws the same.

The filters and their order are those of transformers' `generate`: repetition penalty, temperature,
top-k, top-p, min-p. Each row has its options and its seed, and draws by them alone: what it draws
does not depend on the other rows. Nothing is sorted. Top-k and top-p need the least logit that they
keep, which 32 halvings of the range of f32 find: on a CPU that is about ten times as fast as
sorting a large vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.errors import UserError
from moe_jax.generation.sampling_options import SamplingOptions

COLDEST = 1e-30  # a smaller temperature would divide by zero
NOT_FINITE = -1  # in place of a token
KEY_KIND = "threefry2x32"


class Filters(NamedTuple):
    """Which parts of the program some row needs; the others are not compiled."""

    draws: bool  # not all rows take the likeliest token
    top_k: bool
    top_p: bool
    min_p: bool
    penalty: bool


class RowOptions(NamedTuple):
    """Every row's options as arrays; a filter that a row does not have lets every token pass."""

    temperature: jax.Array  # f32 [B]
    top_k: jax.Array  # i32 [B]
    tail: jax.Array  # f32 [B], 1 - top_p: f32 has more digits near 0 than near 1
    min_p: jax.Array  # f32 [B]
    penalty: jax.Array  # f32 [B]
    key: jax.Array  # [B]


class RowState(NamedTuple):
    """What a draw changes."""

    drawn: jax.Array  # i32 [B], tokens drawn so far: with the row's key they give its next number
    occurred: jax.Array | None  # bool [B, V]; None without a repetition penalty


class Sampler:
    """Draws the tokens of rows of text; the same options, prompt and logits give a row the same
    tokens.
    """

    def __init__(self, options: Sequence[SamplingOptions], num_ids: int | None = None):
        """`options` of each row. Draws from the first `num_ids` tokens (by default all): ids after
        them pad the vocabulary and stand for no text.
        """
        self._num_ids, self._options = num_ids, row_options(options)
        self._filters = Filters(
            draws=any(row.temperature > 0 for row in options),
            top_k=any(row.top_k is not None for row in options),
            top_p=any(row.top_p is not None for row in options),
            min_p=any(row.min_p is not None for row in options),
            penalty=any(row.repetition_penalty != 1 for row in options),
        )
        self._state = RowState(jnp.zeros(len(options), jnp.int32), None)
        self._prompts: dict[int, list[int]] = {}  # of texts that begin with the next draw
        self._sharding: Any = None  # of the options and the state

    def begin(self, prompt: Iterable[int], row: int = 0) -> None:
        """Starts a text in a row after `prompt`, whose tokens the repetition penalty counts as
        having occurred.
        """
        self._prompts[row] = list(prompt)

    def draw(self, logits_BV: jax.Array) -> np.ndarray:
        """A token for each row, i32 [B], from f32 logits [B, V] that stay where they are.

        Raises UserError where a row's logits are not finite.
        """
        logits_BV = jnp.asarray(logits_BV)
        rows, vocabulary = logits_BV.shape
        if rows != len(self._state.drawn):
            raise ValueError(f"the logits have {rows} rows, the options {len(self._state.drawn)}")
        if self._filters.penalty:
            self._count_prompts(rows, min(vocabulary, self._num_ids or vocabulary))
        sharding = _on_every_device(logits_BV.sharding)
        if sharding != self._sharding:
            self._options, self._state = _placed((self._options, self._state), sharding)
            self._sharding = sharding
        token_B, self._state = draw_program(sharding)(
            self._filters, self._num_ids, logits_BV, self._options, self._state
        )
        tokens = jax.device_get(token_B)  # one array: each fetch waits for the device
        if (tokens == NOT_FINITE).any():
            raise UserError(
                "The model's logits are not finite (NaN or infinite): its weights are damaged, or "
                "try --dtype float32."
            )
        return tokens

    def _count_prompts(self, rows: int, vocabulary: int) -> None:
        """Makes the tokens of texts that begin those that have occurred in their rows."""
        occurred = self._state.occurred
        occurred = jnp.zeros((rows, vocabulary), bool) if occurred is None else occurred
        for row, prompt in self._prompts.items():
            occurred_V = np.zeros(vocabulary, bool)
            occurred_V[[token for token in prompt if token < vocabulary]] = True
            occurred = occurred.at[row].set(occurred_V)
        if self._prompts or self._state.occurred is None:
            self._state, self._sharding = self._state._replace(occurred=occurred), None
        self._prompts.clear()


def row_options(options: Sequence[SamplingOptions]) -> RowOptions:
    """The rows' options as the program takes them."""
    arrays = option_arrays(options)
    key = jax.random.wrap_key_data(jnp.asarray(arrays["key"]), impl=KEY_KIND)
    return RowOptions(**{name: jnp.asarray(array) for name, array in arrays.items()} | {"key": key})


def option_arrays(options: Sequence[SamplingOptions]) -> dict[str, np.ndarray]:
    """The fields of `RowOptions` on the host; of each key its numbers, u32 [B, 2]."""
    largest, most = float(np.finfo(np.float32).max), np.iinfo(np.int32).max
    keys = [np.random.SeedSequence(row.seed).generate_state(2) for row in options]  # of any size
    tails = [1 - (1 if row.top_p is None else row.top_p) for row in options]
    return {
        "temperature": np.array([min(row.temperature, largest) for row in options], np.float32),
        "top_k": np.array([min(row.top_k or most, most) for row in options], np.int32),
        "tail": np.array(tails, np.float32),
        "min_p": np.array([row.min_p or 0.0 for row in options], np.float32),
        "penalty": np.array([min(row.repetition_penalty, largest) for row in options], np.float32),
        "key": np.array(keys, np.uint32),
    }


def _on_every_device(sharding: Any) -> Any:
    """The sharding of what all devices of the logits hold alike."""
    return NamedSharding(sharding.mesh, P()) if isinstance(sharding, NamedSharding) else sharding


def _placed(tree: Any, sharding: Any) -> Any:
    """Arrays with a sharding that may be of devices of other processes, which have the same."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.jit(lambda arrays: arrays, out_shardings=sharding)(tree)


@functools.cache
def draw_program(sharding: Any) -> Any:
    """The compiled `draw_tokens`, its results with this sharding."""
    return jax.jit(draw_tokens, static_argnums=(0, 1), out_shardings=sharding)


def draw_tokens(
    filters: Filters,
    num_ids: int | None,
    logits_BV: jax.Array,
    options: RowOptions,
    state: RowState,
) -> tuple[jax.Array, RowState]:
    """Each row's token, i32 [B], NOT_FINITE where its logits are not, and the state after."""
    logits_BV, occurred_BV = logits_BV[:, :num_ids], state.occurred
    if occurred_BV is not None:
        logits_BV = penalised(logits_BV, occurred_BV, options.penalty[:, None])
    top_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)  # NaN where there is one
    token_B = _first(logits_BV == top_B1)
    if filters.draws:
        chance_BV = chances(filters, logits_BV, options)
        key_B = jax.vmap(jax.random.fold_in)(options.key, state.drawn)
        drawn_B = _pick(chance_BV, jax.vmap(jax.random.uniform)(key_B)[:, None])
        token_B = jnp.where(options.temperature > 0, drawn_B, token_B)
    if occurred_BV is not None:
        row_B = jnp.arange(token_B.shape[0])
        occurred_BV = occurred_BV.at[row_B, token_B].set(True, mode="promise_in_bounds")
    token_B = jnp.where(jnp.isfinite(top_B1[:, 0]), token_B, NOT_FINITE)
    return token_B, RowState(state.drawn + 1, occurred_BV)


def chances(filters: Filters, logits_BV: jax.Array, options: RowOptions) -> jax.Array:
    """Chances of the tokens that the filters leave, not normalised, f32 [B, V]; the likeliest has
    1.
    """
    temperature_B1 = jnp.maximum(options.temperature, COLDEST)[:, None]
    chance_BV = jnp.exp((logits_BV - jnp.max(logits_BV, -1, keepdims=True)) / temperature_B1)
    if filters.top_k:
        dropped_B1 = chance_BV.shape[1] - options.top_k.astype(jnp.float32)[:, None]
        kept_BV = _without_tail(logits_BV, jnp.ones_like(chance_BV), dropped_B1)
        chance_BV = jnp.where(kept_BV, chance_BV, 0)
    if filters.top_p:
        tail_B1 = options.tail[:, None] * jnp.sum(chance_BV, axis=-1, keepdims=True)
        chance_BV = jnp.where(_without_tail(chance_BV, chance_BV, tail_B1), chance_BV, 0)
    if filters.min_p:
        chance_BV = jnp.where(chance_BV >= options.min_p[:, None], chance_BV, 0)
    return chance_BV


def penalised(logits_BV: jax.Array, occurred_BV: jax.Array, penalty_B1: jax.Array) -> jax.Array:
    """Logits with those of tokens that occurred lowered by the repetition penalty."""
    less_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(occurred_BV, less_BV, logits_BV)


def _without_tail(values_BV: jax.Array, weight_BV: jax.Array, tail_B1: jax.Array) -> jax.Array:
    """Which tokens are not in the tail of a row, bool [B, V]: with the least values, and of equal
    ones the last, whose weights together are at most `tail_B1`. The largest value never is.

    The sums are over the tail, because f32 adds many small numbers best by themselves.
    """
    order_BV = _ordered_bits(values_BV)

    def up_to(bits_B1: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(order_BV <= bits_B1, weight_BV, 0), axis=-1, keepdims=True)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B1, high_B1 = bounds
        middle_B1 = (low_B1 & high_B1) + ((low_B1 ^ high_B1) >> 1)  # cannot overflow
        beyond_B1 = up_to(middle_B1) > tail_B1
        return jnp.where(beyond_B1, low_B1, middle_B1 + 1), jnp.where(beyond_B1, middle_B1, high_B1)

    # The least value up to which there is more than the tail.
    limits = np.iinfo(np.int32)
    bounds = jnp.full_like(order_BV[:, :1], limits.min), jnp.full_like(order_BV[:, :1], limits.max)
    _, edge_B1 = lax.fori_loop(0, 32, halve, bounds)
    equal_BV = jnp.where(order_BV == edge_B1, weight_BV, 0)
    from_here_BV = up_to(edge_B1) - (jnp.cumsum(equal_BV, axis=-1) - equal_BV)
    kept_BV = (order_BV > edge_B1) | ((order_BV == edge_B1) & (from_here_BV > tail_B1))
    first_B = _first(order_BV == jnp.max(order_BV, axis=-1, keepdims=True))
    return kept_BV | (jnp.arange(kept_BV.shape[1]) == first_B[:, None])


def _ordered_bits(values: jax.Array) -> jax.Array:
    """Integers in the order of f32 values, equal for equal ones."""
    bits = lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), jnp.int32)
    return jnp.where(bits < 0, bits ^ np.iinfo(np.int32).max, bits)


def _pick(chance_BV: jax.Array, uniform_B1: jax.Array) -> jax.Array:
    """The token of each row at a place, uniform in [0, 1), of its chances end to end."""
    ends_BV = jnp.cumsum(chance_BV, axis=-1)
    # Without chance none is taken, even where rounding moves the ends.
    beyond_BV = (ends_BV > uniform_B1 * ends_BV[:, -1:]) & (chance_BV > 0)
    likeliest_B = _first(chance_BV == jnp.max(chance_BV, axis=-1, keepdims=True))
    return jnp.where(jnp.any(beyond_BV, axis=-1), _first(beyond_BV), likeliest_B)


def _first(mask_BV: jax.Array) -> jax.Array:
    """The first token of each row that is marked, i32 [B]; 0 where none is."""
    token_V = jnp.arange(mask_BV.shape[1], dtype=jnp.int32)
    first_B = jnp.min(jnp.where(mask_BV, token_V, token_V.size), axis=-1)
    return first_B % token_V.size
