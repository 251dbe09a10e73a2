"""Which layers are alike: repeating patterns of layers are stacked, so that they can be scanned."""

from __future__ import annotations

from typing import NamedTuple

from moe_jax.config.model import ModelConfig, MoEConfig


class LayerKind(NamedTuple):
    """What distinguishes one layer from another."""

    moe: bool
    window: int | None
    reads_encoder: bool = False  # a layer of a forecaster's decoder


def layer_kinds(model: ModelConfig, moe: MoEConfig) -> list[LayerKind]:
    """The kind of each layer, in order; a forecaster's decoder comes after its encoder, which is
    dense.
    """

    def is_dense(layer: int) -> bool:
        return (
            layer < moe.first_dense
            or (layer - moe.first_dense + 1) % moe.every != 0
            or layer in moe.dense_layers
        )

    if model.forecasts:
        encoder = [LayerKind(False, None)] * model.num_layers
        decoder = range(model.forecast.decoder_layers)
        return encoder + [LayerKind(not is_dense(layer), None, True) for layer in decoder]

    def kind(layer: int) -> LayerKind:
        full = (
            model.window_every > 1 and (layer + 1) % model.window_every == 0
        ) or layer in model.full_layers
        return LayerKind(not is_dense(layer), None if full else model.sliding_window)

    return [kind(layer) for layer in range(model.num_layers)]


def count_moe_layers(model: ModelConfig, moe: MoEConfig) -> int:
    """Layers that have experts."""
    return sum(kind.moe for kind in layer_kinds(model, moe))


def routes_by_sequence(model: ModelConfig, moe: MoEConfig) -> bool:
    """Whether experts are chosen for whole sequences, of which all tokens must be known."""
    return moe.route_by == "sequence" and count_moe_layers(model, moe) > 0


def stack_layers(kinds: list[LayerKind]) -> list[tuple[tuple[LayerKind, ...], int]]:
    """Cuts the layers into (pattern, repeats), at each point taking the pattern whose repeats cover
    most layers.
    """
    stacks: list[tuple[tuple[LayerKind, ...], int]] = []
    at = 0
    while at < len(kinds):
        best = (tuple(kinds[at : at + 1]), 1)
        for size in range(1, (len(kinds) - at) // 2 + 1):
            pattern, repeats = kinds[at : at + size], 1
            while kinds[at + repeats * size : at + (repeats + 1) * size] == pattern:
                repeats += 1
            if repeats > 1 and size * repeats > len(best[0]) * best[1]:
                best = (tuple(pattern), repeats)
        stacks.append(best)
        at += len(best[0]) * best[1]
    return stacks


def expert_layers(model: ModelConfig, moe: MoEConfig) -> dict[tuple[int, int], list[int]]:
    """For block j of stack i, the numbers among the MoE layers of its repeats: where tables and
    weights meet.
    """
    numbers: dict[tuple[int, int], list[int]] = {}
    done = 0
    for i, (kinds, repeats) in enumerate(stack_layers(layer_kinds(model, moe))):
        blocks = [j for j, kind in enumerate(kinds) if kind.moe]
        for at, j in enumerate(blocks):
            numbers[i, j] = [done + repeat * len(blocks) + at for repeat in range(repeats)]
        done += len(blocks) * repeats
    return numbers
