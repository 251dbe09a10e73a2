"""The configuration tree: frozen dataclasses that know their ranges and their impossible
combinations.

Only the standard library is needed here, so that layers can be built without a file or a validator;
`load.py` reads YAML into these types. Every field has its help text, from which
docs/configuration.md is generated. A section sees only itself; `Config` checks what spans sections.
The sections of the model itself are in model.py.
"""

from __future__ import annotations

from typing import Literal

from moe_jax.config.fields import PathTo, section, setting
from moe_jax.config.model import ModelConfig, MoEConfig
from moe_jax.errors import UserError

# What may stand in the place of the path of a text or of series.
SOURCE_WORDS = "builtin|hf:.*|kernel:[0-9]+|mixup:[0-9]+"


@section
class PlacementConfig:
    """Where experts live, and when they move."""

    SECTION = "placement."

    strategy: Literal["contiguous", "round_robin", "balanced", "topology_aware", "custom"] = (
        setting(
            default="contiguous",
            help="contiguous: consecutive experts on each device. round_robin: expert e on device "
            "e % R. balanced: by measured load. topology_aware: by load and links. custom: the "
            "table in `file`.",
        )
    )
    redundant_slots: int = setting(
        default=0, help="Slots per device beyond its share of the experts, for replicas.", ge=0
    )
    max_experts_per_device: int | None = setting(
        default=None, help="Largest number of slots per device; null sets no limit.", ge=1
    )
    replan_every: int = setting(
        default=0,
        help="Steps between decisions to move experts, by the load measured since the last one; 0 "
        "never moves any.",
        ge=0,
    )
    min_gain: float = setting(
        default=0.05,
        help="Move a layer's experts only if the predicted load of its busiest device (with "
        "topology_aware: of its busiest device and link) falls by at least this fraction.",
        ge=0,
        le=1,
    )
    file: str | None = setting(
        default=None,
        help="JSON table for `custom`, as `moe-jax placement plan --out` writes it.",
        path=PathTo(),
    )
    topology: str | None = setting(
        default=None,
        help="YAML file of hosts, links and memory; null takes one host per process and assumed "
        "links.",
        path=PathTo(),
    )

    def check(self) -> None:
        planned = self.strategy in ("balanced", "topology_aware")
        if self.replan_every and not planned:
            raise UserError(
                f"placement.replan_every={self.replan_every} needs a strategy that plans, and "
                f"placement.strategy={self.strategy} "
                "does not: choose balanced or topology_aware, or leave replan_every at 0."
            )
        if planned and self.replan_every < 2:
            raise UserError(
                f"placement.strategy={self.strategy} with "
                f"placement.replan_every={self.replan_every} would never plan: set replan_every "
                f"to the "
                "steps, at least 2, whose load a plan is to follow."
            )
        if (self.strategy == "custom") != (self.file is not None):
            raise UserError(
                f"placement.strategy={self.strategy} with placement.file={self.file or 'null'}: a "
                f"file goes with custom, and custom needs one."
            )
        if self.strategy == "custom" and self.redundant_slots:
            raise UserError(
                f"placement.redundant_slots={self.redundant_slots} does not go with "
                f"placement.strategy=custom, whose table says how many slots "
                "there are: leave it out."
            )


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

    @property
    def axes_text(self) -> str:
        """The axes as `--mesh` takes them, such as `expert=4,tensor=2`; "" for one device."""
        axes = {"data": self.data, "expert": self.expert, "tensor": self.tensor}
        return ",".join(f"{axis}={size}" for axis, size in axes.items() if size > 1)


@section
class DevicesConfig:
    """Which devices."""

    SECTION = "devices."

    simulate: int = setting(
        default=0, help="Simulated CPU devices; 0 uses the machine's devices.", ge=0, le=4096
    )


@section
class MixtureSource:
    """One of several sources."""

    SECTION = "data.mixture."

    source: str = setting(
        default="builtin",
        help="As `data.source`.",
        path=PathTo(words=SOURCE_WORDS),
    )
    weight: float = setting(
        default=1.0, help="Its share of the sequences, relative to the others'.", gt=0
    )


@section
class DataConfig:
    """Text in, packed token sequences out ([data.md](data.md))."""

    SECTION = "data."

    source: str = setting(
        default="builtin",
        help="`builtin` (Python's own documentation and sources), a file or folder (.txt .py .md "
        ".jsonl .parquet), a folder that `moe-jax data prepare` wrote, or `hf:NAME`. Of a "
        "forecaster: a folder of series, or `kernel:N`, N series of KernelSynth; in a mixture also "
        "`mixup:N`, N mixtures of the other sources' series.",
        path=PathTo(words=SOURCE_WORDS),
    )
    mixture: tuple[MixtureSource, ...] = setting(
        default=(),
        help="Several sources in place of `source`, as `[{source: PATH, weight: 2}, ...]`: each "
        "gives its exact share of the sequences.",
    )
    tokenizer: str = setting(
        default="bytes",
        help="`bytes`, or the path of a tokenizer.json or of a folder that transformers reads.",
        path=PathTo(words="bytes"),
    )
    text_field: str = setting(
        default="text",
        help="Field or column with the text in JSONL, parquet and datasets; a row without it may "
        "have a conversation in `messages`, which the tokenizer's chat template renders.",
    )
    loss_on: Literal["assistant", "all"] = setting(
        default="assistant",
        help="Tokens of a conversation that count in the loss: the assistant's turns, or all. Of a "
        "text all do.",
    )
    split: str = setting(default="train", help="Split to read with `hf:NAME`.")
    validation_fraction: float = setting(
        default=0.05, help="Fraction of the documents held out for validation.", gt=0, le=0.5
    )

    min_past: int = setting(
        default=64, help="Series: values before what is to be forecast, at least.", ge=1
    )
    drop: float = setting(
        default=0.2,
        help="Series: of each window a share that is drawn from 0 to this is made missing.",
        ge=0,
        le=0.9,
    )

    def check(self) -> None:
        if self.mixture and self.source != "builtin":
            raise UserError(
                f"data.source={self.source} does not go with data.mixture, which names the sources "
                f"itself: leave one of them out."
            )


@section
class OptimizerConfig:
    """How parameters are updated."""

    SECTION = "optimizer."

    name: Literal["adamw", "adafactor", "muon"] = setting(
        default="adamw", help="Optimizer; muon updates matrices, and AdamW the other parameters."
    )
    learning_rate: float = setting(default=3e-3, help="Peak learning rate.", gt=0)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = setting(
        default="cosine",
        help="Learning rate after the warmup; wsd: constant, then decaying over the last fifth.",
    )
    warmup_steps: int = setting(default=20, help="Steps of linear warmup.", ge=0)
    final_fraction: float = setting(
        default=0.1, help="Learning rate at the end, as a fraction of the peak.", ge=0, le=1
    )
    weight_decay: float = setting(
        default=0.1, help="Decoupled weight decay, of matrices only.", ge=0
    )
    beta1: float = setting(default=0.9, help="Decay of the first moment.", ge=0, le=0.9999)
    beta2: float = setting(default=0.95, help="Decay of the second moment.", ge=0, le=0.99999)
    eps: float = setting(default=1e-8, help="Epsilon in the ratio of the moments.", gt=0)
    clip_norm: float = setting(default=1.0, help="Largest global gradient norm.", gt=0)
    expert_lr_scale: float = setting(
        default=1.0, help="Factor on the experts' learning rate.", ge=0
    )
    router_lr_scale: float = setting(
        default=1.0, help="Factor on the routers' learning rate.", ge=0
    )


@section
class TrainConfig:
    """The run."""

    SECTION = "train."

    steps: int = setting(default=200, help="Optimizer steps.", ge=1)
    seed: int = setting(
        default=0, help="Seed of initialisation, data order and noise.", ge=0, le=2**32 - 1
    )
    global_batch: int = setting(default=16, help="Sequences per step, over all devices (B).", ge=1)
    seq_len: int = setting(default=256, help="Tokens per sequence (S).", ge=2)
    accumulation: int = setting(
        default=1, help="Parts that a step's batch is split into, one after another.", ge=1
    )
    log_every: int = setting(default=1, help="Steps between lines in metrics.jsonl.", ge=1)
    eval_every: int = setting(default=100, help="Steps between validations; also at the end.", ge=1)
    eval_batches: int = setting(default=4, help="Batches per validation.", ge=1)
    max_skipped: int = setting(
        default=5,
        help="The run stops after this many steps in a row whose loss or gradient is not finite.",
        ge=1,
    )
    hang_timeout: float | None = setting(
        default=None,
        help="Seconds after which a process ends, with exit code 75, where what it does stands "
        "still; starting, compiling and restoring have at least 600 s. null: 10 times the slowest "
        "of the newest steps, at least 60 s.",
        gt=0,
    )
    sample_prompt: str | None = setting(
        default=None,
        help="Prompt of the sample printed at the end; null takes the beginning of a held-out "
        "document, empty prints no sample.",
    )
    sample_tokens: int = setting(default=120, help="Tokens of that sample.", ge=1)


@section
class CheckpointConfig:
    """Which checkpoints are made and kept."""

    SECTION = "checkpoint."

    every: int = setting(
        default=100, help="Steps between checkpoints; one is always made at the end.", ge=1
    )
    keep_last: int = setting(default=2, help="Newest checkpoints kept.", ge=1)
    keep_best: int = setting(
        default=1, help="More checkpoints kept, those of the lowest validation loss.", ge=0
    )


@section
class MonitorConfig:
    """Limits of alerts: a line of metrics above one raises an alert. 0 turns a limit off."""

    SECTION = "monitor."

    device_load: float = setting(
        default=4.0,
        help="Load of a layer's busiest device, relative to the mean of its devices.",
        ge=0,
    )
    max_violation: float = setting(
        default=8.0,
        help="Load of a layer's busiest expert, relative to the mean of its experts, minus 1.",
        ge=0,
    )
    dead_experts: float = setting(
        default=0.5,
        help="Fraction of a layer's experts that no token of the step chose.",
        ge=0,
        le=1,
    )
    dropped: float = setting(
        default=0.3,
        help="Fraction of the step's token-expert assignments that were dropped.",
        ge=0,
        le=1,
    )


@section
class Config:
    """The whole configuration. Only its readers and the jobs that take it see it whole."""

    SECTION = ""

    name: str = setting(
        default="run",
        help="Name of the run; a new run is written to runs/NAME unless --run-dir is given.",
    )
    init_from: str | None = setting(
        default=None,
        help="A Hugging Face folder, a run directory or a model on the hub such as "
        "`Qwen/Qwen3-30B-A3B`, whose weights training starts from; null draws them at random.",
        path=PathTo(hub=True),
    )
    model: ModelConfig = setting(default=ModelConfig(), help="The transformer.")
    moe: MoEConfig = setting(default=MoEConfig(), help="The experts.")
    placement: PlacementConfig = setting(default=PlacementConfig(), help="Where experts live.")
    mesh: MeshConfig = setting(default=MeshConfig(), help="The device mesh.")
    devices: DevicesConfig = setting(default=DevicesConfig(), help="The devices.")
    data: DataConfig = setting(default=DataConfig(), help="The data.")
    optimizer: OptimizerConfig = setting(default=OptimizerConfig(), help="The optimizer.")
    train: TrainConfig = setting(default=TrainConfig(), help="The run.")
    checkpoint: CheckpointConfig = setting(default=CheckpointConfig(), help="Checkpoints.")
    monitor: MonitorConfig = setting(default=MonitorConfig(), help="When training raises an alert.")

    def check(self) -> None:
        mesh, model, simulate = self.mesh, self.model, self.devices.simulate
        if simulate and mesh.size != simulate:
            raise UserError(
                f"mesh.data={mesh.data} x mesh.expert={mesh.expert} x mesh.tensor={mesh.tensor} "
                f"is {mesh.size} devices but "
                f"devices.simulate={simulate}: make them equal."
            )
        for key, value in (
            ("num_heads", model.num_heads),
            ("num_kv_heads", 0 if model.forecasts else model.num_kv_heads),
            ("hidden", model.hidden),
        ):
            if value % mesh.tensor:
                raise UserError(
                    f"mesh.tensor={mesh.tensor} does not divide model.{key}={value}: change one "
                    f"of them."
                )
        self._check_forecaster()
        if self.moe.hidden % mesh.tensor:
            raise UserError(
                f"mesh.tensor={mesh.tensor} does not divide moe.hidden={self.moe.hidden}: change "
                f"one of them."
            )
        ranks = {"latent.q_rank": model.latent.q_rank or 0, "latent.kv_rank": model.latent.kv_rank}
        for key, size in {"width": model.width, **ranks}.items():
            if size % (mesh.data * mesh.expert):
                raise UserError(
                    f"model.{key}={size} is not divisible by mesh.data x mesh.expert = "
                    f"{mesh.data * mesh.expert}, over which "
                    "parameters are sharded: change one of them."
                )
        share, most = (
            -(-self.moe.num_experts // mesh.expert) + self.placement.redundant_slots,
            self.placement.max_experts_per_device,
        )
        if most is not None and share > most and self.placement.strategy != "custom":
            raise UserError(
                f"placement.max_experts_per_device={most} but {self.moe.num_experts} experts over "
                f"mesh.expert={mesh.expert} with "
                f"placement.redundant_slots={self.placement.redundant_slots} take {share} slots "
                f"per device: raise it, or use more devices."
            )
        part = self.train.accumulation * mesh.data * mesh.expert
        if self.train.global_batch % part:
            raise UserError(
                f"train.global_batch={self.train.global_batch} is not divisible by "
                f"train.accumulation x mesh.data x mesh.expert = "
                f"{part}: use a multiple of {part}."
            )

    def _check_forecaster(self) -> None:
        model, moe = self.model, self.moe
        if not model.forecasts:
            return
        has_experts = moe.first_dense < model.forecast.decoder_layers
        if has_experts and moe.route_by != "sequence":
            raise UserError(
                f"moe.route_by={moe.route_by} does not go with "
                f"model.forecast.patch={model.forecast.patch}: a forecaster routes each series "
                f"once; set moe.route_by=sequence."
            )
