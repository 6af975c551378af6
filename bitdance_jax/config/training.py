"""The parts of every training run's config (`bitdance_jax.train.task.TrainingConfig`)."""

import os
from dataclasses import dataclass
from typing import Annotated, Literal

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
    require,
)


@dataclass(frozen=True)
class OptimizerConfig(Config):
    """AdamW with warm-up, clipping and an exponential moving average (paper 4.2).

    Attributes:
      learning_rate: peak value.
      warmup_steps: steps in which it rises linearly from 0.
      schedule: after the warm-up, "constant", or "cosine" to `end_learning_rate` at the last step.
      end_learning_rate: of the cosine, at the last step.
      decay_start: step at which the cosine starts; None: right after the warm-up.
      b1, b2: decay rates of the first and the second moment.
      weight_decay: of tensors with two or more dimensions, except connector, class embedding and
        query tokens.
      eps: added to the root of the second moment.
      clip_norm: global gradient norm; None: no clipping.
      ema_decay: of the exponential moving average, float32, which starts at the initial
        weights; None: there is none, and the weights themselves are sampled and exported.
      ema_warmup: the decay of step n, from 0, is at most (1 + n) / (10 + n), so that the average
        soon forgets the initial weights. Without it, as in the paper, a share ema_decay^n of them
        remains after n steps, which short runs notice.
    """

    learning_rate: Positive = 6e-4
    warmup_steps: Natural = 20_000
    schedule: Literal["cosine", "constant"] = "cosine"
    end_learning_rate: NotNegative = 1e-5
    decay_start: Natural | None = None
    b1: Decay = 0.9
    b2: Decay = 0.95
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.05
    clip_norm: Positive | None = 1.0
    ema_decay: Decay | None = 0.9999
    ema_warmup: bool = False


@dataclass(frozen=True)
class RunConfig(Config):
    """Length, precision and folders of a training run, and the intervals of its outputs.

    Attributes:
      workdir: local folder of the run: checkpoints, metrics, images, and at the end the model
        folder `model/`.
      steps: total number of optimizer steps.
      seed: of the initial weights, the order of the data and all noise.
      compute_dtype: of activations; parameters, EMA and optimizer state are float32.
      gradient_dtype: of the sums of gradients over images and devices: "float32", or "compute" for
        the compute type.
      export_dtype: of the weights in the finished model folder.
      remat: what is stored of a transformer layer, or of a tokenizer's residual block, for the
        backward pass: everything ("none"), the products with weights ("dots"), or "nothing".
      attention: the transformer's kernel: "xla" anywhere; in bfloat16 "cudnn" on CUDA GPUs and
        "pallas" on TPUs; "auto" the fastest one.
      accumulate: number of micro-batches that a batch is split into; their gradients are summed one
        after the other, which saves memory.
      spike: the run stops when the loss of a step exceeds this many times the median of the last
        hundred losses; None: never.
      stall_minutes: the run ends with an error when a step takes longer than this and 20 times the
        median of the last hundred; None: never. Steps that compile, evaluate, preview or save have
        six times as long.
      log_every, save_every, preview_every: in steps.
      keep: number of checkpoints to keep, the newest ones.
      checkpoints: their folder, local or gs://; None: `checkpoints` in the workdir. On several
        hosts all must have access to it.
    """

    workdir: PathName
    steps: Count
    seed: Seed = 0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_dtype: Literal["float32", "compute"] = "float32"
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "nothing"] = "none"
    attention: Literal["auto", "xla", "cudnn", "pallas"] = "auto"
    accumulate: Count = 1
    spike: Annotated[float, Range(1, above=True)] | None = 5.0
    stall_minutes: Positive | None = 10.0
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
            "workdir",
        )
        require(
            self.attention in ("auto", "xla") or self.compute_dtype == "bfloat16",
            f"attention {self.attention} computes in bfloat16; set run.compute_dtype bfloat16",
            "attention",
        )

    @property
    def checkpoint_folder(self) -> str:
        """The folder of the checkpoints."""
        return self.checkpoints or os.path.join(self.workdir, "checkpoints")


@dataclass(frozen=True)
class DiscriminatorConfig(Config):
    """The PatchGAN discriminator that a tokenizer is trained against, and its optimizer, Adam.

    Attributes:
      filters: channels of its first convolution.
      layers: its strided convolutions.
      learning_rate: constant.
      b1, b2: decays of Adam's moments.
      lecam: weight of LeCAM regularization.
      start: step of the first update, and of the first adversarial loss.
      adaptive: scale the adversarial loss so that its gradient at the decoder's last layer is as
        large as that of the reconstruction and perceptual losses. The loss then jumps at `start`
        and with the weight: set `run.spike` None.
    """

    filters: Count = 64
    layers: Count = 3
    learning_rate: Positive = 1e-4
    b1: Decay = 0.5
    b2: Decay = 0.9
    lecam: NotNegative = 0.05
    start: Natural = 0
    adaptive: bool = False


@dataclass(frozen=True)
class TokenizerLossConfig(Config):
    """Weights of the tokenizer's losses (paper 3.1, 4.1).

    Attributes:
      l1, l2: weights of the mean absolute and mean squared pixel error.
      entropy: weight of the per-sample entropy minus the codebook entropy.
      commitment: weight of mean((z - code)^2).
      temperature: of the codebook logits.
      kl: weight of the Kullback-Leibler divergence of continuous latents, in nats for each number
        of an image; they have no entropy and commitment terms.
      perceptual: weight of the distance in a network's features.
      perceptual_network: "vgg16" for LPIPS, or "efficientnet", which needs no file.
      perceptual_weights: file with the network's weights; None: VGG16 from PyTorch's cache,
        EfficientNet-Lite0 from the extra `perceptual`.
      adversarial: weight of the adversarial loss; 0: there is no discriminator.
      discriminator: its sizes and optimizer.
    """

    l1: NotNegative = 0.0
    l2: NotNegative = 1.0
    entropy: NotNegative = 0.02
    commitment: NotNegative = 0.05
    temperature: Positive = 0.01
    kl: NotNegative = 1e-6
    perceptual: NotNegative = 0.0
    perceptual_network: Literal["vgg16", "efficientnet"] = "vgg16"
    perceptual_weights: PathName | None = None
    adversarial: NotNegative = 0.0
    discriminator: DiscriminatorConfig = DiscriminatorConfig()


@dataclass(frozen=True)
class MeshConfig(Config):
    """Sizes of the mesh axes (`bitdance_jax.distributed.mesh`).

    Their product must be the number of devices; one of them may be -1: whatever remains.

    Attributes:
      data: copies of the weights; each has its own part of the batch.
      fsdp: parts of the weights, optimizer state and EMA; each has its own part of the batch too.
      tensor: parts of each layer's width; all of them have the same part of the batch.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = (self.data, self.fsdp, self.tensor)
        for name, size in zip(("data", "fsdp", "tensor"), sizes, strict=True):
            line = f"{name} must be positive, or -1 for the remaining devices, got {size}"
            require(size > 0 or size == -1, line, name)
        require(sizes.count(-1) <= 1, f"only one mesh axis can be -1, got {sizes}")


@dataclass(frozen=True)
class HostsConfig(Config):
    """How this process finds those on other hosts.

    JAX knows these values on Cloud TPUs and under Slurm and Open MPI; elsewhere they must be set.

    Attributes:
      coordinator: host:port of process 0.
      num_processes: number of processes.
      process_id: number of this one, from 0.
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
            "hosts.coordinator, hosts.num_processes and hosts.process_id must be set together",
            "hosts",
        )
        if self.num_processes is not None and self.process_id is not None:
            last = self.num_processes - 1
            require(
                self.process_id <= last,
                f"hosts.process_id must be from 0 to {last}, got {self.process_id}",
                "hosts.process_id",
            )
