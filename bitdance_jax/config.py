"""Every size and hyper-parameter, as frozen dataclasses; the released models as named presets.

Sizes are those of the paper (arXiv 2602.14041, tables of sections 3 and 4) and of the published release. A config is plain data: it
turns to and from JSON (`to_dict`, `from_dict`) and is what `config.json` of a model folder holds.
"""

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar

from bitdance_jax.errors import UserError


T = TypeVar("T")


class ConfigError(UserError):
    """A configuration that cannot work; the message names the field and the mend in one line."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class TokenizerConfig:
    """The CNN tokenizer (paper 3.1). The field names after `bits` are those of the release's `ddconfig`.

    Attributes:
      bits: bits of one token (`z_channels`).
      ch: width of the finest level; a multiple of 32, the number of GroupNorm groups.
      ch_mult: width multiplier of each level, finest first. Each level but the last halves the image.
      num_res_blocks: residual blocks of each level and of the middle.
      image_channels: channels of a picture.
      decoder: "plain", or "gan": the decoder also takes normal noise of the code's shape.
      num_codebooks: groups the bits are split into for the entropy terms; it must divide `bits`.
    """

    bits: int = 32
    ch: int = 256
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 4
    image_channels: int = 3
    decoder: Literal["plain", "gan"] = "plain"
    num_codebooks: int = 4

    def __post_init__(self) -> None:
        _require(self.bits > 0, f"bits must be positive, got {self.bits}")
        _require(self.ch > 0 and self.ch % 32 == 0, f"ch must be a positive multiple of 32 (GroupNorm groups), got {self.ch}")
        _require(len(self.ch_mult) > 0 and min(self.ch_mult) > 0, f"ch_mult must be positive integers, got {self.ch_mult}")
        _require(self.num_res_blocks > 0, f"num_res_blocks must be positive, got {self.num_res_blocks}")
        _require(
            self.num_codebooks > 0 and self.bits % self.num_codebooks == 0,
            f"num_codebooks must divide bits, got {self.num_codebooks} and {self.bits}",
        )

    @property
    def downsampling(self) -> int:
        """Pixels along one side of a token."""
        return 2 ** (len(self.ch_mult) - 1)

    @classmethod
    def d16c32(cls) -> Self:
        """The released `ae_d16c32` (460M): 32 bits for 16x16 pixels."""
        return cls(bits=32, ch=256, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=4)

    @classmethod
    def d32c128(cls) -> Self:
        """The released `ae_d32c128` (421M): 128 bits for 32x32 pixels, GAN decoder."""
        return cls(bits=128, ch=128, ch_mult=(1, 1, 2, 2, 4, 8), num_res_blocks=4, decoder="gan", num_codebooks=16)


@dataclass(frozen=True)
class TransformerConfig:
    """The block-causal transformer of the class-conditional models (paper 3.3, table of sizes in 4.2).

    Attributes:
      num_layers: pre-norm blocks.
      dim: width.
      num_heads: attention heads; `dim / num_heads` must be a multiple of 4 (2-D rotary pairs).
      rope_base: base of the rotary frequencies.
      norm_eps: epsilon of every RMSNorm.
    """

    num_layers: int
    dim: int
    num_heads: int
    rope_base: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _require(min(self.num_layers, self.dim, self.num_heads) > 0, "num_layers, dim and num_heads must be positive")
        _require(
            self.dim % (4 * self.num_heads) == 0, f"dim must be a multiple of 4 * num_heads, got {self.dim} and {self.num_heads} heads"
        )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def hidden_dim(self) -> int:
        """Width inside the SwiGLU: int(8 dim / 3) rounded up to a multiple of 256."""
        return -(-int(2 * 4 * self.dim / 3) // 256) * 256


@dataclass(frozen=True)
class FlowHeadConfig:
    """The binary diffusion head (paper 3.2): a DiT over the tokens of one patch, an MLP when a patch is one token.

    Attributes:
      width: width of the blocks.
      num_blocks: blocks in all.
      num_groups: adaLN linear layers; each is shared by `num_blocks / num_groups` consecutive blocks.
      head_dim: size of an attention head (unused when a patch is one token).
      use_swiglu: SwiGLU inside the blocks, or Linear, silu, Linear.
      squash_output: map the output through 2 sigmoid(o) - 1 (the text-to-image heads).
      time_distribution: of the training times: "logit_normal" or "uniform".
      time_mean, time_std: t = sigmoid(time_std n + time_mean).
      time_shift: s of t <- (1/s) / (1/s + 1/t - 1), in training and sampling.
    """

    width: int
    num_blocks: int
    num_groups: int
    head_dim: int = 64
    use_swiglu: bool = True
    squash_output: bool = False
    time_distribution: Literal["logit_normal", "uniform"] = "logit_normal"
    time_mean: float = -0.8
    time_std: float = 0.8
    time_shift: float = 1.0

    def __post_init__(self) -> None:
        _require(min(self.width, self.num_blocks, self.num_groups) > 0, "width, num_blocks and num_groups must be positive")
        _require(self.num_blocks % self.num_groups == 0, f"num_groups must divide num_blocks, got {self.num_groups} and {self.num_blocks}")
        _require(self.width % self.head_dim == 0, f"head_dim must divide width, got {self.head_dim} and {self.width}")
        _require(self.width % 2 == 0, f"width must be even, got {self.width}")
        _require(self.time_shift > 0, f"time_shift must be positive, got {self.time_shift}")


@dataclass(frozen=True)
class ClassConditionalConfig:
    """Class-conditional BitDance (paper 3 and 4.2): tokenizer, transformer and head together.

    Attributes:
      tokenizer, transformer, head: the three parts.
      num_classes: labels are 0 ... num_classes - 1; `num_classes` itself is the unconditional one.
      image_size: side of the square pictures, in pixels.
      tokens_per_step: P, a square number; p = sqrt(P) tokens along a patch's side.
      class_tokens: prefix tokens made from one class embedding row.
      order: "patch" raster, or "token" raster cut into runs of P (Table 14).
      mask: "block_causal", or "causal" (the ablation without block visibility).
      bit_flip_rate: an input bit flips with probability u * rate, u uniform for each bit.
      label_drop_rate: share of the labels replaced by the unconditional one.
      head_repeats: fresh times and noises for each target (`diff_batch_mul`).
    """

    tokenizer: TokenizerConfig
    transformer: TransformerConfig
    head: FlowHeadConfig
    num_classes: int
    image_size: int
    tokens_per_step: int
    class_tokens: int = 64
    order: Literal["patch", "token"] = "patch"
    mask: Literal["block_causal", "causal"] = "block_causal"
    bit_flip_rate: float = 0.1
    label_drop_rate: float = 0.1
    head_repeats: int = 4

    def __post_init__(self) -> None:
        down = self.tokenizer.downsampling
        _require(self.num_classes > 0, f"num_classes must be positive, got {self.num_classes}")
        _require(self.class_tokens > 0, f"class_tokens must be positive, got {self.class_tokens}")
        _require(self.head_repeats > 0, f"head_repeats must be positive, got {self.head_repeats}")
        _require(self.patch_side**2 == self.tokens_per_step, f"tokens_per_step must be a square number, got {self.tokens_per_step}")
        _require(
            self.image_size > 0 and self.image_size % (down * self.patch_side) == 0,
            f"image_size must be a multiple of {down * self.patch_side} (downsampling {down} x patch side {self.patch_side}), "
            f"got {self.image_size}",
        )
        for name in ("bit_flip_rate", "label_drop_rate"):
            _require(0 <= getattr(self, name) <= 1, f"{name} must be between 0 and 1, got {getattr(self, name)}")

    @property
    def patch_side(self) -> int:
        return round(self.tokens_per_step**0.5)

    @property
    def grid(self) -> int:
        """Tokens along one side of a picture."""
        return self.image_size // self.tokenizer.downsampling

    @property
    def num_tokens(self) -> int:
        return self.grid**2

    @property
    def num_steps(self) -> int:
        """Autoregressive steps of one picture."""
        return self.num_tokens // self.tokens_per_step

    @classmethod
    def imagenet(cls, name: str) -> Self:
        """An ImageNet 256px model: "b_1x", "b_4x", "b_16x", "l_1x", ..., "h_16x" (SPEC 2). Published: B-1x, B-4x, B-16x, L-1x, H-1x."""
        sizes = {"b": (24, 768, 12, 6, 2), "l": (32, 1024, 16, 8, 2), "h": (40, 1280, 20, 12, 3)}
        size, _, parallel = name.lower().replace("-", "_").partition("_")
        if size not in sizes or parallel not in ("1x", "4x", "16x"):
            names = ", ".join(f"{s}_{p}" for s in sizes for p in ("1x", "4x", "16x"))
            raise ConfigError(f"unknown ImageNet model {name!r}; one of: {names}")
        layers, dim, heads, blocks, groups = sizes[size]
        return cls(
            tokenizer=TokenizerConfig.d16c32(),
            transformer=TransformerConfig(num_layers=layers, dim=dim, num_heads=heads),
            head=FlowHeadConfig(width=dim, num_blocks=blocks, num_groups=groups),
            num_classes=1000,
            image_size=256,
            tokens_per_step=int(parallel[:-1]),
            bit_flip_rate=0.1 if size == "b" else 0.05,
        )


@dataclass(frozen=True)
class SamplerConfig:
    """How the head is solved and guided (paper 3.2; SPEC 3).

    Attributes:
      head_steps: N; the head runs N + 1 times for each patch with "euler_maruyama", N times with "euler".
      solver: "euler_maruyama" as released, or "euler" as in the paper's equation 4.
      guidance_scale: classifier-free guidance s on the velocity; 1 means none.
      guidance_schedule: "linear", s_i = 1 + (s - 1) i / steps at step i, or "constant".
    """

    head_steps: int = 100
    solver: Literal["euler_maruyama", "euler"] = "euler_maruyama"
    guidance_scale: float = 1.0
    guidance_schedule: Literal["linear", "constant"] = "linear"

    def __post_init__(self) -> None:
        _require(self.head_steps > 0, f"head_steps must be positive, got {self.head_steps}")
        _require(self.guidance_scale >= 0, f"guidance_scale must not be negative, got {self.guidance_scale}")


@dataclass(frozen=True)
class AugmentConfig:
    """Training augmentation (SPEC 4): ADM's random resized crop and a horizontal flip, fading to centre crops.

    Attributes:
      min_crop: smallest share of the (resized) shorter side that a crop keeps; 1 means the largest square, always.
      flip: probability of a horizontal flip.
      decay_start, decay_end: epochs between which the share of augmented pictures falls from 1 to 0; None: never.
    """

    min_crop: float = 0.8
    flip: float = 0.5
    decay_start: float | None = None
    decay_end: float | None = None

    def __post_init__(self) -> None:
        _require(0 < self.min_crop <= 1, f"min_crop must be in (0, 1], got {self.min_crop}")
        _require(0 <= self.flip <= 1, f"flip must be between 0 and 1, got {self.flip}")
        _require((self.decay_start is None) == (self.decay_end is None), "decay_start and decay_end go together")
        if self.decay_start is not None and self.decay_end is not None:
            _require(0 <= self.decay_start <= self.decay_end, "decay_start must not be after decay_end")


@dataclass(frozen=True)
class DataConfig:
    """Where training pictures come from.

    Attributes:
      source: "emoji" (embedded, 64px, 9 categories) or "folder" (one sub-folder a class).
      path: the folder, for "folder".
      batch_size: pictures a step.
      augment: see AugmentConfig.
      workers: loader processes; 0 loads in the training process.
      cache_latents: for class-conditional training: run the tokenizer once over the pictures and keep the bits in the run's folder.
        Crops are then the centre ones; a flip chooses between two cached versions.
    """

    source: Literal["emoji", "folder"] = "emoji"
    path: str | None = None
    batch_size: int = 32
    augment: AugmentConfig = AugmentConfig()
    workers: int = 0
    cache_latents: bool = False

    def __post_init__(self) -> None:
        _require(self.batch_size > 0, f"batch_size must be positive, got {self.batch_size}")
        _require(self.workers >= 0, f"workers must not be negative, got {self.workers}")
        _require(
            self.source != "folder" or self.path is not None, "data.source folder needs --data.path, a folder with one sub-folder a class"
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up, clipping and an exponential moving average (SPEC 4).

    Attributes:
      learning_rate: peak value, reached after `warmup_steps` from 0.
      schedule: after the warm-up, "constant", or "cosine" to `end_learning_rate` at the last step, starting at `decay_start` (None: right
        after the warm-up).
      weight_decay: on tensors of two or more dimensions, less the connector, class embedding and query tokens.
      clip_norm: global gradient norm; None: no clipping.
      ema_decay: of the exponential moving average kept in float32, started from the initial weights.
    """

    learning_rate: float = 6e-4
    warmup_steps: int = 20_000
    schedule: Literal["cosine", "constant"] = "constant"
    end_learning_rate: float = 1e-5
    decay_start: int | None = None
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.05
    clip_norm: float | None = 1.0
    ema_decay: float = 0.9999

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, f"learning_rate must be positive, got {self.learning_rate}")
        _require(self.warmup_steps >= 0, f"warmup_steps must not be negative, got {self.warmup_steps}")
        _require(0 <= self.ema_decay < 1, f"ema_decay must be in [0, 1), got {self.ema_decay}")


@dataclass(frozen=True)
class RunConfig:
    """What every training run shares: length, precision, and when it logs, saves and draws.

    Attributes:
      workdir: folder of the run: checkpoints, metrics, pictures, and at the end the model folder `model/`.
      steps: optimizer steps in all.
      seed: of the initial weights, the order of the data and every noise.
      compute_dtype: of activations; parameters, EMA and optimizer state stay float32.
      export_dtype: of the finished model folder's weights.
      remat: what the backward pass keeps of a transformer layer: all of it ("none"), the products with weights ("dots"), or "nothing".
      attention: the transformer's kernel: "xla" anywhere, "cudnn" on CUDA devices in bfloat16.
      log_every, save_every, preview_every: in steps.
      keep: newest checkpoints kept.
    """

    workdir: str
    steps: int
    seed: int = 0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "nothing"] = "none"
    attention: Literal["xla", "cudnn"] = "xla"
    log_every: int = 10
    save_every: int = 500
    preview_every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "save_every", "preview_every", "keep"):
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        _require(
            self.attention == "xla" or self.compute_dtype == "bfloat16",
            "attention cudnn computes in bfloat16; add --run.compute-dtype bfloat16",
        )


@dataclass(frozen=True)
class TokenizerLossConfig:
    """Weights of the tokenizer's training terms (SPEC 1): reconstruction + entropy + commitment.

    Attributes:
      l1, l2: weights of the mean absolute and mean squared pixel error.
      entropy: weight of per-sample minus codebook entropy.
      commitment: weight of mean((z - code)^2).
      temperature: of the codebook logits.
    """

    l1: float = 0.0
    l2: float = 1.0
    entropy: float = 0.02
    commitment: float = 0.05
    temperature: float = 0.01


@dataclass(frozen=True)
class TokenizerTraining:
    """One tokenizer training run: what a file in `configs/` returns."""

    run: RunConfig
    model: TokenizerConfig
    image_size: int
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: TokenizerLossConfig = TokenizerLossConfig()

    def __post_init__(self) -> None:
        down = self.model.downsampling
        _require(self.image_size % down == 0, f"image_size must be a multiple of the downsampling {down}, got {self.image_size}")


@dataclass(frozen=True)
class ClassConditionalTraining:
    """One class-conditional training run: what a file in `configs/` returns.

    Attributes:
      tokenizer: a model folder with the trained tokenizer (frozen here); its sizes must be `model.tokenizer`.
      preview: how the sample grids are drawn while it trains.
    """

    run: RunConfig
    model: ClassConditionalConfig
    tokenizer: str
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    preview: SamplerConfig = field(default_factory=lambda: SamplerConfig(head_steps=20, guidance_scale=2.0))


Training = TokenizerTraining | ClassConditionalTraining


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON-ready data."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], data: dict[str, Any], where: str = "config") -> T:
    """The config that `to_dict` wrote; unknown, missing and ill-typed fields are ConfigErrors that name them."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where} must be an object, got {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(fields))
    _require(not unknown, f"{where} has unknown fields: {', '.join(unknown)}; known: {', '.join(fields)}")
    missing = [
        name
        for name, f in fields.items()
        if name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    _require(not missing, f"{where} lacks the fields: {', '.join(missing)}")
    return cls(**{name: _decode(hints[name], value, f"{where}.{name}") for name, value in data.items()})


def _decode(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)  # type: ignore[arg-type]
    if origin is Literal:
        _require(value in args, f"{where} must be one of {', '.join(map(str, args))}, got {value!r}")
        return value
    if origin is tuple:
        _require(isinstance(value, list | tuple), f"{where} must be a list, got {value!r}")
        return tuple(_decode(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _decode(next(a for a in args if a is not type(None)), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    _require(isinstance(value, hint) and (hint is bool or not isinstance(value, bool)), f"{where} must be {hint.__name__}, got {value!r}")
    return value
