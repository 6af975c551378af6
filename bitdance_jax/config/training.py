"""Training runs: optimizer, run, mesh; a file in `configs/` returns one of these."""

import os
from dataclasses import dataclass, field
from typing import Annotated, Literal

from bitdance_jax.config.data import DataConfig
from bitdance_jax.config.model import ClassConditionalConfig, SamplerConfig, TokenizerConfig
from bitdance_jax.config.plain import (
    Config,
    Count,
    Decay,
    Natural,
    NotNegative,
    PathName,
    Positive,
    Range,
    Seed,
    Size,
    require,
)


@dataclass(frozen=True)
class OptimizerConfig(Config):
    """AdamW with warm-up, clipping and an exponential moving average (paper 4.2).

    Attributes:
      learning_rate: peak value, reached after `warmup_steps` from 0.
      schedule: after the warm-up, "constant", or "cosine" to `end_learning_rate` at the last step, starting at `decay_start` (None: right
        after the warm-up).
      weight_decay: on tensors of two or more dimensions, less the connector, class embedding and query tokens.
      clip_norm: global gradient norm; None: no clipping.
      ema_decay: of the exponential moving average kept in float32, started from the initial weights.
    """

    learning_rate: Positive = 6e-4
    warmup_steps: Natural = 20_000
    schedule: Literal["cosine", "constant"] = "cosine"
    end_learning_rate: NotNegative = 1e-5
    decay_start: Natural | None = None
    b1: Decay = 0.9
    b2: Decay = 0.95
    weight_decay: NotNegative = 0.05
    clip_norm: Positive | None = 1.0
    ema_decay: Decay = 0.9999


@dataclass(frozen=True)
class RunConfig(Config):
    """What every training run shares: length, precision, and when it logs, saves and draws.

    Attributes:
      workdir: local folder of the run: checkpoints, metrics, images, and at the end the model folder `model/`.
      steps: optimizer steps in all.
      seed: of the initial weights, the order of the data and every noise.
      compute_dtype: of activations; parameters, EMA and optimizer state stay float32.
      gradient_dtype: in which gradients are summed over images and devices: "float32", or "compute", the compute type.
      export_dtype: of the finished model folder's weights.
      remat: what the backward pass keeps of a transformer layer: all of it ("none"), the products with weights ("dots"), or "nothing".
      attention: the transformer's kernel: "xla" anywhere, "cudnn" on CUDA GPUs in bfloat16, "auto" the faster one.
      accumulate: parts that a batch is cut into; their gradients are summed one after the other, which saves memory.
      spike: the run stops when a step's loss is this many times the usual one (the median of the last hundred); None: it never does.
      log_every, save_every, preview_every: in steps.
      keep: newest checkpoints kept.
      checkpoints: their folder, local or gs://; None: `checkpoints` in the workdir. Several hosts need one that all of them see.
    """

    workdir: PathName
    steps: Count
    seed: Seed = 0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_dtype: Literal["float32", "compute"] = "float32"
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "nothing"] = "none"
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    accumulate: Count = 1
    spike: Annotated[float, Range(1, above=True)] | None = 5.0
    log_every: Count = 10
    save_every: Count = 500
    preview_every: Count = 500
    keep: Count = 2
    checkpoints: PathName | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            "://" not in self.workdir,
            f"workdir must be a local folder, got {self.workdir}; only checkpoints can go there",
        )
        require(
            self.attention != "cudnn" or self.compute_dtype == "bfloat16",
            "attention cudnn computes in bfloat16; add --run.compute-dtype bfloat16",
        )

    @property
    def checkpoint_folder(self) -> str:
        """Where the checkpoints are."""
        return self.checkpoints or os.path.join(self.workdir, "checkpoints")


@dataclass(frozen=True)
class TokenizerLossConfig(Config):
    """Weights of the tokenizer's training terms (paper 3.1): reconstruction + entropy + commitment.

    Attributes:
      l1, l2: weights of the mean absolute and mean squared pixel error.
      entropy: weight of per-sample minus codebook entropy.
      commitment: weight of mean((z - code)^2).
      temperature: of the codebook logits.
    """

    l1: NotNegative = 0.0
    l2: NotNegative = 1.0
    entropy: NotNegative = 0.02
    commitment: NotNegative = 0.05
    temperature: Positive = 0.01


@dataclass(frozen=True)
class MeshConfig(Config):
    """How the devices are laid out (`bitdance_jax.distributed.mesh`). The product must be their number; -1, once, stands for the rest.

    Attributes:
      data: copies of the weights; each reads its own part of the batch.
      fsdp: parts that weights, optimizer state and EMA are cut into; each reads its own part of the batch too.
      tensor: parts that each layer's width is cut into; these read the same part of the batch.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = (self.data, self.fsdp, self.tensor)
        require(
            all(n > 0 or n == -1 for n in sizes),
            f"mesh axes must be positive, or -1 for the rest, got {sizes}",
        )
        require(sizes.count(-1) <= 1, f"only one mesh axis can be -1, got {sizes}")


@dataclass(frozen=True)
class HostsConfig(Config):
    """How this process finds those on other hosts. Cloud TPUs, Slurm and Open MPI tell JAX by themselves; these are for elsewhere.

    Attributes:
      coordinator: host:port of process 0.
      num_processes: how many there are.
      process_id: which one this is, from 0.
    """

    coordinator: str | None = None
    num_processes: Count | None = None
    process_id: Natural | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [
            value is not None for value in (self.coordinator, self.num_processes, self.process_id)
        ]
        require(
            all(given) or not any(given),
            "hosts.coordinator, hosts.num_processes and hosts.process_id go together",
        )
        if self.num_processes is not None and self.process_id is not None:
            last = self.num_processes - 1
            require(
                self.process_id <= last,
                f"hosts.process_id must be from 0 to {last}, got {self.process_id}",
            )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Config):
    """What every training run has.

    Attributes:
      mesh: how the devices are laid out; a run may be resumed on another mesh.
      hosts: how the processes find each other.
      profile: first and last step of a trace for TensorBoard or Perfetto, written to the run's folder; None: no trace.
      init: model folder, or folder of a run, whose weights a new run starts from; "emoji" is the embedded model. None: drawn from the
        seed.
    """

    run: RunConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    hosts: HostsConfig = HostsConfig()
    profile: tuple[Count, Count] | None = None
    init: PathName | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        first, last = self.profile or (1, 1)
        require(
            first <= last and first <= self.run.steps,
            f"profile must be two steps in order, from 1 to run.steps ({self.run.steps}), got {self.profile}",
        )
        batch, accumulate = self.data.batch_size, self.run.accumulate
        require(
            batch % accumulate == 0,
            f"data.batch_size must be a multiple of run.accumulate, got {batch} and {accumulate}",
        )


@dataclass(frozen=True, kw_only=True)
class TokenizerTraining(TrainingConfig):
    """One tokenizer training run: what a file in `configs/` returns."""

    model: TokenizerConfig
    image_size: Size
    loss: TokenizerLossConfig = TokenizerLossConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        down = self.model.downsampling
        require(
            self.image_size % down == 0,
            f"image_size must be a multiple of the downsampling {down}, got {self.image_size}",
        )


@dataclass(frozen=True, kw_only=True)
class ClassConditionalTraining(TrainingConfig):
    """One class-conditional training run: what a file in `configs/` returns.

    Attributes:
      tokenizer: a model folder with the trained tokenizer (frozen here); its sizes must be `model.tokenizer`.
      preview: how the sample grids are drawn while it trains.
    """

    model: ClassConditionalConfig
    tokenizer: PathName
    preview: SamplerConfig = field(
        default_factory=lambda: SamplerConfig(head_steps=20, guidance_scale=2.0)
    )


Training = TokenizerTraining | ClassConditionalTraining
