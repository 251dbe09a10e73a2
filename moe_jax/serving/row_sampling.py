"""The next token of every row, each drawn as its own request asks, on the devices.

A row is drawn by `generation.sampling.draw_tokens`, by the program of its own kind: which parts of
it are compiled in depends on the row's options and not on those of the other rows, so neither does
a bit of what it draws. Where rows of several kinds are there, several programs run.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from moe_jax.generation.sampling import (
    KEY_KIND,
    Filters,
    RowOptions,
    RowState,
    draw_tokens,
    option_arrays,
    penalised,
)
from moe_jax.runtime.platform import default_platform
from moe_jax.serving.request import Request

MOST_TOP = 20  # likeliest tokens that a step can tell


class DrawKind(NamedTuple):
    """Which parts of the program a row needs."""

    draws: bool  # it does not take the likeliest token
    filters: bool  # by rank or by sum of chances
    adjusts: bool  # its logits are changed: by penalties, biases or a mask


DRAW_KINDS = tuple(
    DrawKind(draws, filters, adjusts)
    for adjusts in (False, True)
    for draws, filters in ((False, False), (True, False), (True, True))
)


def draw_kind(request: Request) -> DrawKind:
    """What a request's rows need."""
    sampling, draws = request.sampling, request.sampling.temperature > 0
    adjusts = (
        sampling.repetition_penalty != 1
        or request.presence_penalty != 0
        or request.frequency_penalty != 0
        or bool(request.logit_bias)
        or request.min_tokens > 0
        or request.token_filter is not None
    )
    filters = draws and (sampling.top_k is not None or sampling.top_p is not None)
    return DrawKind(draws, filters, adjusts)


class Adjustments(NamedTuple):
    """What changes the logits of rows, beside their options."""

    bias_SV: jax.Array  # f32, added to the logits
    prompt_SV: jax.Array  # bool: the token is in the prompt
    count_SV: jax.Array  # i32, how often it was drawn


class RowSampler:
    """The options of all rows, on the host, and the state of those that need one, on the devices.

    Every method takes values of the host alone: several processes that call the same ones in the
    same order hold the same.
    """

    def __init__(self, rows: int, num_ids: int, sharding: NamedSharding):
        """`sharding` is that of what all devices hold alike."""
        self.num_ids = num_ids
        self._options = {
            name: np.repeat(array, rows, axis=0)
            for name, array in option_arrays([Request((0,), 1).sampling]).items()
        }
        self._penalty_2S = np.zeros((2, rows), np.float32)  # presence, frequency
        self._adjustments = Adjustments(
            *(
                jnp.zeros((rows, num_ids), dtype, device=sharding)
                for dtype in (jnp.float32, bool, jnp.int32)
            )
        )
        self._begin, self._draw, self._top = sampling_programs(sharding)

    def begin(self, row: int, request: Request, kind: DrawKind) -> None:
        """A request takes a row; of its token filter only the kind knows."""
        for name, array in option_arrays([request.sampling]).items():
            self._options[name][row] = array[0]
        self._penalty_2S[:, row] = request.presence_penalty, request.frequency_penalty
        if kind.adjusts:
            bias_V, prompt_V = np.zeros(self.num_ids, np.float32), np.zeros(self.num_ids, bool)
            for token, bias in request.logit_bias.items():
                if 0 <= token < self.num_ids:
                    bias_V[token] = bias
            prompt_V[[token for token in request.prompt if token < self.num_ids]] = True
            self._adjustments = self._begin(self._adjustments, np.int32(row), bias_V, prompt_V)

    def draw(
        self,
        logits_SV: jax.Array,
        kinds: dict[int, DrawKind],
        drawn_S: np.ndarray,
        allowed: dict[int, np.ndarray],
    ) -> np.ndarray:
        """The next token of the rows that `kinds` has, i32 [S], NOT_FINITE where the logits are
        not; that of other rows means nothing.

        `drawn_S` are the tokens drawn so far, of the first rows at least, which alone are then
        computed; `allowed` is bool [num_ids] of rows that may not take every token.
        """
        rows, results = len(drawn_S), {}
        options = {name: array[:rows] for name, array in self._options.items()}
        for kind in sorted(set(kinds.values())):
            of_kind_S = np.array([kinds.get(row) == kind for row in range(rows)])
            extra: tuple[Any, ...] = (None, None, None, None)
            if kind.adjusts:
                allowed_SV = np.ones((rows, self.num_ids), bool)
                for row, mask in allowed.items():
                    allowed_SV[row] = mask
                extra = (self._penalty_2S[:, :rows], of_kind_S, allowed_SV, self._adjustments)
            token_S, after = self._draw(kind, self.num_ids, logits_SV, options, drawn_S, *extra)
            if kind.adjusts:
                self._adjustments = after
            results[kind] = token_S
        tokens = {kind: np.asarray(token_S) for kind, token_S in results.items()}
        return np.array(
            [tokens[kinds[row]][row] if row in kinds else 0 for row in range(rows)], np.int32
        )

    def top(self, logits_SV: jax.Array, token_S: np.ndarray) -> tuple[np.ndarray, ...]:
        """`top_tokens`, on the host."""
        return jax.device_get(self._top(self.num_ids, logits_SV, token_S))


@functools.cache
def sampling_programs(sharding: NamedSharding) -> tuple[Any, Any, Any]:
    """The compiled `begin_row`, `draw_rows` and `top_tokens`, their results with this sharding."""
    donated = (0,) if default_platform().donates else ()
    return (
        jax.jit(begin_row, donate_argnums=donated, out_shardings=sharding),
        jax.jit(draw_rows, static_argnums=(0, 1), out_shardings=sharding),
        jax.jit(top_tokens, static_argnums=0, out_shardings=sharding),
    )


def begin_row(
    adjustments: Adjustments, row: jax.Array, bias_V: jax.Array, prompt_V: jax.Array
) -> Adjustments:
    """The adjustments with those of a new request in one row."""
    return Adjustments(
        adjustments.bias_SV.at[row].set(bias_V),
        adjustments.prompt_SV.at[row].set(prompt_V),
        adjustments.count_SV.at[row].set(0),
    )


def draw_rows(
    kind: DrawKind,
    num_ids: int,
    logits_SV: jax.Array,
    options: dict[str, jax.Array],
    drawn_S: jax.Array,
    penalty_2S: jax.Array | None,
    of_kind_S: jax.Array | None,
    allowed_SV: jax.Array | None,
    adjustments: Adjustments | None,
) -> tuple[jax.Array, Adjustments | None]:
    """A token for each of the first rows, i32 [S], as a row of this kind draws it, and the
    adjustments with the tokens of rows of this kind counted. Logits and adjustments may have more
    rows.

    The arguments after `drawn_S` are there for a kind that adjusts.
    """
    rows = drawn_S.shape[0]
    key = jax.random.wrap_key_data(options["key"], impl=KEY_KIND)
    row_options = RowOptions(**options | {"key": key})
    logits_SV = logits_SV[:rows, :num_ids]
    if adjustments is not None:
        assert penalty_2S is not None and allowed_SV is not None
        bias_SV, prompt_SV, count_SV = (array[:rows] for array in adjustments)
        occurred_SV = prompt_SV | (count_SV > 0)
        logits_SV = penalised(logits_SV, occurred_SV, row_options.penalty[:, None])
        logits_SV -= penalty_2S[0, :, None] * (count_SV > 0) + penalty_2S[1, :, None] * count_SV
        logits_SV = jnp.where(allowed_SV, logits_SV + bias_SV, -jnp.inf)
    filters = Filters(kind.draws, kind.filters, kind.filters, kind.draws, penalty=False)
    token_S, _ = draw_tokens(filters, None, logits_SV, row_options, RowState(drawn_S, None))
    if adjustments is None:
        return token_S, None
    assert of_kind_S is not None
    at = (jnp.arange(rows), jnp.maximum(token_S, 0))
    count_SV = adjustments.count_SV.at[at].add(of_kind_S.astype(jnp.int32))
    return token_S, adjustments._replace(count_SV=count_SV)


def top_tokens(
    num_ids: int, logits_SV: jax.Array, token_S: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """By the model's own logits, nats: the log-probability of the tokens of the first rows, f32
    [S], and the likeliest tokens, i32 [S, T], with theirs, f32 [S, T].
    """
    log_SV = jax.nn.log_softmax(logits_SV[: token_S.shape[0], :num_ids], axis=-1)
    own_S = jnp.take_along_axis(log_SV, jnp.maximum(token_S, 0)[:, None], axis=-1)[:, 0]
    log_ST, token_ST = jax.lax.top_k(log_SV, min(MOST_TOP, num_ids))
    return own_S, token_ST, log_ST
