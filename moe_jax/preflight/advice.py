"""What would make a run fit that does not: settings, each with what it changes."""

from __future__ import annotations

from moe_jax.config.schema import Config
from moe_jax.preflight.chips import Target
from moe_jax.preflight.measure import Measured
from moe_jax.preflight.programs import EVALUATION, TRAIN_STEP
from moe_jax.preflight.serving import DECODE, PREFILL, Serving


def remedies(
    programs: list[Measured], target: Target, config: Config | None, serving: Serving | None
) -> list[str]:
    """A sentence for each setting that lowers the memory of a program that does not fit; they were
    not compiled.
    """
    memory = target.chip.memory
    lacking = {one.name: one for one in programs if not one.fits(memory)}
    advice = []
    if config is not None and {TRAIN_STEP, EVALUATION} & lacking.keys():
        advice += _training(lacking.get(TRAIN_STEP), memory, config)
    if serving is not None and {PREFILL, DECODE} & lacking.keys():
        advice += _serving(lacking, serving)
    if lacking and not advice:
        advice.append("Use more devices, or devices with more memory.")
    return advice


def _training(step: Measured | None, memory: float, config: Config) -> list[str]:
    mesh, train, advice = config.mesh, config.train, []
    if config.model.remat != "full":
        advice.append("--set model.remat=full keeps only the inputs of layers.")
    rows = train.global_batch // (mesh.data * mesh.expert * train.accumulation)
    if rows > 1:
        advice.append(
            f"--set train.accumulation={train.accumulation * 2} halves the {rows} rows per device "
            f"and part."
        )
    if step is not None and step.argument_bytes > memory / 2:
        advice.append(
            f"The state takes {step.argument_bytes / 1e9:.1f} GB per device: with more devices, "
            f"--set mesh.data={mesh.data * 2}, it takes half."
        )
    if not advice:
        advice.append(
            f"Use more devices: --set mesh.data={mesh.data * 2} halves the state, or a shorter "
            f"train.seq_len than {train.seq_len} the activations."
        )
    return advice


def _serving(lacking: dict[str, Measured], serving: Serving) -> list[str]:
    advice = []
    if serving.quantize == "float":
        advice.append("--quantize int8 halves the weights, int4 quarters them.")
    if DECODE in lacking and serving.rows > 1:
        advice.append(f"--rows {serving.rows // 2} halves the cache.")
    if PREFILL in lacking:
        advice.append("--prompt with fewer tokens reads a long prompt in chunks.")
    return advice
