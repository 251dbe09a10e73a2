"""The configuration tree: frozen dataclasses that know their ranges and their impossible combinations.

Only the standard library is needed here, so that the layers can be built without a file or a
validator; `config.py` reads YAML into these types. Every field carries its help text, from which
docs/configuration.md is generated. A section sees itself alone; what spans sections is checked in
`Config`. Errors are `UserError`s that name the field, the value and the remedy.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, dataclass_transform

from moe_jax.errors import UserError


def setting(*, default: Any, help: str, ge: float | None = None, gt: float | None = None, le: float | None = None) -> Any:
    """A field with a default, its help text, and the closed or open bounds that its value must keep."""
    return dataclasses.field(default=default, metadata={"help": help, "ge": ge, "gt": gt, "le": le})


def bounds_text(metadata: Any) -> str:
    """The bounds of a field as text (`>= 1, <= 2`), empty when it has none."""
    symbols = {"ge": ">=", "gt": ">", "le": "<="}
    return ", ".join(f"{symbol} {metadata[key]}" for key, symbol in symbols.items() if metadata.get(key) is not None)


def _check_bounds(section: Any) -> None:
    for field in dataclasses.fields(section):
        value, bounds = getattr(section, field.name), field.metadata
        if value is None or isinstance(value, (str, bool, tuple)) or dataclasses.is_dataclass(value):
            continue
        inside = (
            (bounds["ge"] is None or value >= bounds["ge"])
            and (bounds["gt"] is None or value > bounds["gt"])
            and (bounds["le"] is None or value <= bounds["le"])
        )
        if not inside:
            raise UserError(f"{section.SECTION}{field.name}={value!r} is out of range: it must be {bounds_text(bounds)}.")
    section.check()


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(setting,))
def section(cls: type) -> type:
    """Makes a frozen keyword-only dataclass whose bounds and combinations are checked on construction."""
    cls.__post_init__ = _check_bounds  # type: ignore[attr-defined]
    if not hasattr(cls, "check"):
        cls.check = lambda self: None  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True)(cls)


@section
class RopeConfig:
    """Rotary position embedding (Su et al., 2021) and its length extensions."""

    SECTION = "model.rope."

    theta: float = setting(default=10_000.0, help="Base of the rotary frequencies.", gt=0)
    scaling: Literal["none", "linear", "dynamic", "llama3", "yarn"] = setting(
        default="none", help="How frequencies are rescaled beyond `original_length`."
    )
    factor: float = setting(default=1.0, help="How many times longer than `original_length` the context may be.", ge=1)
    original_length: int = setting(default=4096, help="Context length, in tokens, that the frequencies were made for.", ge=1)
    low_freq_factor: float = setting(default=1.0, help="llama3: wavelengths above original_length/this are divided by `factor`.", gt=0)
    high_freq_factor: float = setting(default=4.0, help="llama3: wavelengths below original_length/this stay as they are.", gt=0)
    beta_fast: float = setting(default=32.0, help="yarn: rotations over original_length above which a frequency stays as it is.", gt=0)
    beta_slow: float = setting(
        default=1.0, help="yarn: rotations over original_length below which a frequency is divided by `factor`.", gt=0
    )

    def check(self) -> None:
        if self.scaling == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                f"model.rope.high_freq_factor={self.high_freq_factor:g} must exceed low_freq_factor={self.low_freq_factor:g}: raise it."
            )


@section
class ModelConfig:
    """The decoder-only transformer around the experts."""

    SECTION = "model."

    vocab_size: int | None = setting(default=None, help="Vocabulary (V); null takes the tokenizer's.", ge=2)
    num_layers: int = setting(default=4, help="Transformer layers (L).", ge=1)
    width: int = setting(default=128, help="Model width (D).", ge=1)
    num_heads: int = setting(default=4, help="Query heads (H).", ge=1)
    num_kv_heads: int = setting(default=2, help="Key and value heads (G); it divides num_heads.", ge=1)
    head_dim: int | None = setting(default=None, help="Head width (Q); null is width/num_heads.", ge=2)
    hidden: int = setting(default=512, help="Hidden width of the feed-forward part in dense layers.", ge=1)
    qk_norm: bool = setting(default=True, help="RMS-normalise each query and key head before the rotation.")
    sliding_window: int | None = setting(default=None, help="Tokens that a position may look back on, itself included; null is all.", ge=1)
    window_every: int = setting(
        default=1, help="Sliding-window layers: every n-th keeps full attention; 1 puts the window in all layers.", ge=1
    )
    tied_embeddings: bool = setting(default=True, help="The output head is the transposed embedding.")
    norm_eps: float = setting(default=1e-6, help="Epsilon of the RMS norms.", gt=0)
    compute_dtype: Literal["float32", "bfloat16"] = setting(
        default="float32", help="Type of activations and of weights in matmuls; masters are f32."
    )
    remat: Literal["none", "dots", "full"] = setting(
        default="none", help="Recompute in the backward pass: nothing, all but matmuls, or the whole layer."
    )
    attention: Literal["auto", "reference", "blockwise", "cudnn"] = setting(
        default="auto", help="Attention back end; auto chooses by platform."
    )
    rope: RopeConfig = setting(default=RopeConfig(), help="Rotary position embedding.")

    @property
    def head_width(self) -> int:
        """Head width Q."""
        return self.head_dim or self.width // self.num_heads

    def check(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"model.num_kv_heads={self.num_kv_heads} does not divide model.num_heads={self.num_heads}: choose a divisor.")
        if self.head_dim is None and self.width % self.num_heads:
            raise UserError(
                f"model.num_heads={self.num_heads} does not divide model.width={self.width}: change one, or set model.head_dim."
            )
        if self.head_width % 2:
            raise UserError(f"model.head_dim={self.head_width} is odd and cannot be rotated: choose an even width.")


@section
class MoEConfig:
    """Router, experts and how tokens travel between them. All that a MoE layer sees of the configuration."""

    SECTION = "moe."

    num_experts: int = setting(default=8, help="Experts a layer (E).", ge=1)
    top_k: int = setting(default=2, help="Experts a token is sent to (K).", ge=1)
    hidden: int = setting(default=128, help="Hidden width of an expert (F).", ge=1)
    capacity_factor: float = setting(
        default=1.25, help="Rows of a (source, destination) pool over the even share; more are dropped, or wait a round.", gt=0
    )
    dropless: bool = setting(default=False, help="Drop nothing: what does not fit a pool goes in further rounds.")
    first_dense: int = setting(default=0, help="Leading layers that are dense.", ge=0)
    every: int = setting(default=1, help="Every n-th of the other layers has experts; 1 is all of them.", ge=1)
    dense_layers: tuple[int, ...] = setting(default=(), help="Indices of further layers that are dense.")
    score: Literal["softmax", "sigmoid"] = setting(default="softmax", help="Scores from logits: over all experts, or each by itself.")
    normalize: Literal["before", "after"] = setting(
        default="after", help="Weights are scores as they are (before selection), or rescaled to sum to 1 (after)."
    )
    routed_scale: float = setting(default=1.0, help="Factor on the routed experts' weights.", gt=0)
    num_groups: int = setting(default=1, help="Groups of experts for group-limited selection (DeepSeek); 1 is none.", ge=1)
    top_groups: int = setting(default=1, help="Groups that a token may choose from.", ge=1)
    shared_experts: int = setting(
        default=0, help="Experts that every token passes through, fused into one of this many times `hidden`.", ge=0
    )
    shared_gate: bool = setting(default=False, help="Scale the shared experts' output by a sigmoid gate of the token.")
    temperature: float = setting(default=1.0, help="Router logits are divided by it.", gt=0)
    input_noise: float = setting(default=0.0, help="Training: the router's input is multiplied by uniform noise in 1 +- this.", ge=0, le=1)
    expert_dropout: float = setting(default=0.0, help="Training: chance that an expert cannot be chosen by a sequence.", ge=0, le=0.9)
    bias_rate: float = setting(default=0.0, help="Step of the balance bias, updated without a loss (DeepSeek-V3); 0 is off.", ge=0)
    z_loss: float = setting(default=0.001, help="Coefficient of the router z-loss.", ge=0)
    aux_loss: float = setting(default=0.01, help="Coefficient of the Switch load-balancing loss over the whole batch.", ge=0)
    sequence_aux_loss: float = setting(default=0.0, help="Coefficient of the same loss within each sequence.", ge=0)
    variance_loss: float = setting(default=0.0, help="Coefficient of the variance over experts of usage (mean score times E).", ge=0)
    dispatch: Literal["auto", "pooled", "gather"] = setting(
        default="auto", help="Pools and all_to_all, or gather of all tokens; auto takes gather for few."
    )
    gather_below: int = setting(default=8, help="dispatch=auto gathers when a device has fewer tokens than this.", ge=0)
    grouped_matmul: Literal["auto", "reference", "ragged", "tiled"] = setting(
        default="auto", help="Grouped matmul back end; auto chooses by platform."
    )

    def check(self) -> None:
        if self.top_k > self.num_experts:
            raise UserError(f"moe.top_k={self.top_k} exceeds moe.num_experts={self.num_experts}: lower top_k or add experts.")
        if self.num_experts % self.num_groups:
            raise UserError(f"moe.num_groups={self.num_groups} does not divide moe.num_experts={self.num_experts}: choose a divisor.")
        if self.top_groups > self.num_groups:
            raise UserError(f"moe.top_groups={self.top_groups} exceeds moe.num_groups={self.num_groups}: lower it.")
        if self.top_k > self.top_groups * (self.num_experts // self.num_groups):
            raise UserError(f"moe.top_groups={self.top_groups} leaves fewer experts than moe.top_k={self.top_k}: raise top_groups.")
        if self.num_groups > 1 and self.num_experts // self.num_groups < 2:
            raise UserError(f"moe.num_groups={self.num_groups} leaves one expert a group: use fewer groups.")
        if self.shared_gate and not self.shared_experts:
            raise UserError("moe.shared_gate=true needs a shared expert: set moe.shared_experts.")


@section
class PlacementConfig:
    """Where experts live."""

    SECTION = "placement."

    redundant_slots: int = setting(default=0, help="Slots a device beyond its share of experts, for replicas.", ge=0)


@section
class MeshConfig:
    """The device mesh; its product is the number of devices."""

    SECTION = "mesh."

    data: int = setting(default=1, help="Devices along the data axis.", ge=1)
    expert: int = setting(default=1, help="Devices along the expert axis (R).", ge=1)
    tensor: int = setting(default=1, help="Devices along the tensor axis.", ge=1)

    @property
    def size(self) -> int:
        """Devices in all."""
        return self.data * self.expert * self.tensor


@section
class DevicesConfig:
    """Which devices."""

    SECTION = "devices."

    simulate: int = setting(default=0, help="Simulated CPU devices; 0 uses the devices that are there.", ge=0, le=4096)


@section
class DataConfig:
    """Text in, packed token sequences out."""

    SECTION = "data."

    source: str = setting(
        default="builtin",
        help="`builtin` (Python's own documentation and sources), a file or folder (.txt .py .md .jsonl .parquet), or `hf:NAME`.",
    )
    tokenizer: str = setting(default="bytes", help="`bytes`, or the path of a tokenizer.json or of a folder that transformers reads.")
    text_field: str = setting(default="text", help="Field or column with the text in JSONL, parquet and datasets.")
    split: str = setting(default="train", help="Split to read with `hf:NAME`.")
    validation_fraction: float = setting(default=0.05, help="Share of the documents held out for validation.", gt=0, le=0.5)


@section
class OptimizerConfig:
    """How parameters move."""

    SECTION = "optimizer."

    name: Literal["adamw", "adafactor", "muon"] = setting(
        default="adamw", help="Optimizer; muon moves matrices and leaves the rest to AdamW."
    )
    learning_rate: float = setting(default=3e-3, help="Peak learning rate.", gt=0)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = setting(
        default="cosine", help="Shape after the warmup; wsd holds, then decays over the last fifth."
    )
    warmup_steps: int = setting(default=20, help="Steps of linear warmup.", ge=0)
    final_fraction: float = setting(default=0.1, help="Learning rate at the end as a share of the peak.", ge=0, le=1)
    weight_decay: float = setting(default=0.1, help="Decoupled weight decay, on matrices only.", ge=0)
    beta1: float = setting(default=0.9, help="Decay of the first moment.", ge=0, le=0.9999)
    beta2: float = setting(default=0.95, help="Decay of the second moment.", ge=0, le=0.99999)
    eps: float = setting(default=1e-8, help="Epsilon of the moments' ratio.", gt=0)
    clip_norm: float = setting(default=1.0, help="Largest global gradient norm.", gt=0)
    expert_lr_scale: float = setting(default=1.0, help="Factor on the experts' learning rate.", ge=0)
    router_lr_scale: float = setting(default=1.0, help="Factor on the routers' learning rate.", ge=0)


@section
class TrainConfig:
    """The run."""

    SECTION = "train."

    steps: int = setting(default=200, help="Optimizer steps.", ge=1)
    seed: int = setting(default=0, help="Seed of initialisation, data order and noise.", ge=0, le=2**32 - 1)
    global_batch: int = setting(default=16, help="Sequences a step, over all devices (B).", ge=1)
    seq_len: int = setting(default=256, help="Tokens a sequence (S).", ge=2)
    accumulation: int = setting(default=1, help="Parts that a step's batch is split into, one after another.", ge=1)
    log_every: int = setting(default=1, help="Steps between lines in metrics.jsonl.", ge=1)
    eval_every: int = setting(default=100, help="Steps between validations; also at the end.", ge=1)
    eval_batches: int = setting(default=4, help="Batches of a validation.", ge=1)
    max_skipped: int = setting(default=5, help="Steps in a row with a loss or gradient that is not finite before the run stops.", ge=1)
    sample_prompt: str = setting(default="def ", help="Prompt of the sample printed at the end; empty prints none.")
    sample_tokens: int = setting(default=120, help="Tokens of that sample.", ge=1)


@section
class CheckpointConfig:
    """What is kept."""

    SECTION = "checkpoint."

    every: int = setting(default=100, help="Steps between checkpoints; one is always made at the end.", ge=1)
    keep_last: int = setting(default=2, help="Newest checkpoints kept.", ge=1)
    keep_best: int = setting(default=1, help="Checkpoints of the lowest validation loss kept besides.", ge=0)


@section
class Config:
    """Everything: only `train.py`, the command line and their like see it whole."""

    SECTION = ""

    name: str = setting(default="run", help="Name of the run; its directory is runs/NAME unless --run-dir is given.")
    model: ModelConfig = setting(default=ModelConfig(), help="The transformer.")
    moe: MoEConfig = setting(default=MoEConfig(), help="The experts.")
    placement: PlacementConfig = setting(default=PlacementConfig(), help="Where experts live.")
    mesh: MeshConfig = setting(default=MeshConfig(), help="The device mesh.")
    devices: DevicesConfig = setting(default=DevicesConfig(), help="The devices.")
    data: DataConfig = setting(default=DataConfig(), help="The data.")
    optimizer: OptimizerConfig = setting(default=OptimizerConfig(), help="The optimizer.")
    train: TrainConfig = setting(default=TrainConfig(), help="The run.")
    checkpoint: CheckpointConfig = setting(default=CheckpointConfig(), help="Checkpoints.")

    def check(self) -> None:
        mesh, model, simulate = self.mesh, self.model, self.devices.simulate
        if simulate and mesh.size != simulate:
            raise UserError(
                f"mesh.data={mesh.data} x mesh.expert={mesh.expert} x mesh.tensor={mesh.tensor} is {mesh.size} devices but "
                f"devices.simulate={simulate}: make them equal."
            )
        for key, value in (("num_heads", model.num_heads), ("num_kv_heads", model.num_kv_heads), ("hidden", model.hidden)):
            if value % mesh.tensor:
                raise UserError(f"mesh.tensor={mesh.tensor} does not divide model.{key}={value}: change one of them.")
        if self.moe.hidden % mesh.tensor:
            raise UserError(f"mesh.tensor={mesh.tensor} does not divide moe.hidden={self.moe.hidden}: change one of them.")
        if model.width % (mesh.data * mesh.expert):
            raise UserError(
                f"model.width={model.width} is not divisible by mesh.data x mesh.expert = {mesh.data * mesh.expert}, over which "
                "parameters are sharded: change one of them."
            )
        part = self.train.accumulation * mesh.data * mesh.expert
        if self.train.global_batch % part:
            raise UserError(
                f"train.global_batch={self.train.global_batch} is not divisible by train.accumulation x mesh.data x mesh.expert = "
                f"{part}: use a multiple of {part}."
            )
