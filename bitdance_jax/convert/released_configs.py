"""Configs of released tokenizers and class-conditional models, from the shapes of their tensors.

What shapes do not determine comes from the arguments that are recorded with the tensors.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from bitdance_jax.config import (
    ClassConditionalConfig,
    FlowHeadConfig,
    SamplerConfig,
    TokenizerConfig,
    TransformerConfig,
)
from bitdance_jax.convert.keys import flow_head_config
from bitdance_jax.errors import FileError, short


LARGEST = 1e18
"""Limit of recorded numbers."""

Shapes = Mapping[str, tuple[int, ...]]

GUIDANCE = {"b_1x": 3.2, "b_4x": 3.9, "b_16x": 6.1, "l_1x": 4.0, "h_1x": 4.55}
"""Guidance scales with which the published models were evaluated (paper 4.2)."""

TIME_SCHEDULES = ("logit_normal", "uniform")
"""Distributions of the head's training times, by their names in the release; default first."""

CODEBOOK_BITS = 8
"""Bits of a codebook in the entropy loss of every published tokenizer, WeTok's included."""

ATTENTION_HEADS = 16
"""Of UniWeTok's blocks, which shapes do not tell."""

HEAD_DIM = 64
"""Size of the attention heads of every released class-conditional model."""


def tokenizer_config(shapes: Shapes, record: Mapping[str, Any]) -> TokenizerConfig:
    """The config of a tokenizer.

    Args:
      shapes: of its state dict.
      record: its `ae_*_config.json` or {}. It gives `num_codebooks`, which only training uses.

    Raises:
      FileError: a tensor that determines the sizes is missing.
    """
    ch, image_channels = shape_of(shapes, "encoder.conv_in.weight", 4)[:2]
    if "quant_conv.weight" in shapes:
        return _continuous_tokenizer_config(shapes, record)
    bits = shape_of(shapes, "encoder.conv_out.weight", 4)[0]
    decoder_inputs = shape_of(shapes, "decoder.conv_in.weight", 4)[1]
    groups = bits // CODEBOOK_BITS if bits % CODEBOOK_BITS == 0 else 1
    return TokenizerConfig(
        bits=bits,
        ch=ch,
        ch_mult=_multipliers(shapes, ch),
        num_res_blocks=count(shapes, r"encoder\.down\.0\.block\.(\d+)\..*"),
        image_channels=image_channels,
        decoder="gan" if decoder_inputs == 2 * bits else "plain",
        num_codebooks=recorded(record, "num_codebooks", groups),
        attention_blocks=_attention_blocks(shapes),
        attention_heads=recorded(_sizes_record(record), "n_heads", ATTENTION_HEADS),
    )


def _multipliers(shapes: Shapes, ch: int) -> tuple[int, ...]:
    """`ch_mult`."""
    levels = count(shapes, r"encoder\.down\.(\d+)\..*")
    keys = [f"encoder.down.{level}.block.0.conv1.weight" for level in range(levels)]
    return tuple(shape_of(shapes, key, 4)[0] // ch for key in keys)


def _continuous_tokenizer_config(shapes: Shapes, record: Mapping[str, Any]) -> TokenizerConfig:
    """The config of latent diffusion's autoencoder; the scale of latents is in no file of MAR's."""
    ch, image_channels = shape_of(shapes, "encoder.conv_in.weight", 4)[:2]
    attends = [
        any(re.match(rf"{side}\.\d+\.attn\.", key) for key in shapes)
        for side in (r"encoder\.down", r"decoder\.up")
    ]
    if attends == [False, True]:
        raise FileError("the decoder has attention at its coarsest level and the encoder has none")
    sizes = TokenizerConfig(
        bits=shape_of(shapes, "post_quant_conv.weight", 4)[0],
        ch=ch,
        ch_mult=_multipliers(shapes, ch),
        num_res_blocks=count(shapes, r"encoder\.down\.0\.block\.(\d+)\..*"),
        image_channels=image_channels,
        num_codebooks=1,
        latents="continuous",
        coarsest_attention="both" if attends[1] else "encoder" if attends[0] else "none",
    )
    mar = TokenizerConfig.kl16()
    default = mar.latent_scale if sizes == dataclasses.replace(mar, latent_scale=1.0) else 1.0
    return dataclasses.replace(sizes, latent_scale=recorded(record, "scale_factor", default))


def _attention_blocks(shapes: Shapes) -> int:
    """Transformer blocks of UniWeTok's encoder; 0 for a CNN tokenizer."""
    if "encoder.register_token.weight" not in shapes:
        return 0
    return count(shapes, r"encoder\.mid_attn_blocks\.(\d+)\..*")


def _sizes_record(record: Mapping[str, Any]) -> Mapping[str, Any]:
    sizes = record.get("ddconfig")
    return sizes if isinstance(sizes, Mapping) else {}


def class_conditional_config(
    shapes: Shapes, record: Mapping[str, Any], tokenizer: TokenizerConfig
) -> ClassConditionalConfig:
    """The config of a class-conditional model.

    Args:
      shapes: of its state dict without the tokenizer.
      record: the known arguments of the release.
      tokenizer: config of its tokenizer.

    Raises:
      FileError: a tensor that determines the sizes is missing, or the sizes contradict each other.
    """
    classes, class_width = shape_of(shapes, "cls_embedding.weight", 2)
    tokens, dim = shape_of(shapes, "pos_for_diff.weight", 2)
    width = shape_of(shapes, "head.net.input_proj.weight", 2)[0]
    grid = math.isqrt(tokens)
    if grid**2 != tokens or class_width % dim:
        raise FileError(
            f"pos_for_diff [{tokens}, {dim}] and cls_embedding [{classes}, {class_width}]"
            " do not belong to one model"
        )
    num_queries = shape_of(shapes, "query_token", 3)[1] if "query_token" in shapes else 0
    w1 = shape_of(shapes, "head.net.res_blocks.0.w1.weight", 2)[0]
    return ClassConditionalConfig(
        tokenizer=tokenizer,
        transformer=TransformerConfig(
            num_layers=count(shapes, r"layers\.(\d+)\..*"),
            dim=dim,
            num_heads=recorded(record, "n_head", max(1, dim // HEAD_DIM)),
        ),
        head=FlowHeadConfig(
            width=width,
            num_blocks=count(shapes, r"head\.net\.res_blocks\.(\d+)\..*"),
            num_groups=count(shapes, r"head\.net\.ada_ln_blocks\.(\d+)\..*"),
            head_dim=HEAD_DIM,
            use_swiglu=w1 == 2 * int(1.5 * width),
            **head_times(record),
        ),
        num_classes=classes - 1,
        image_size=grid * tokenizer.downsampling,
        tokens_per_step=1 + num_queries,
        class_tokens=class_width // dim,
        order="token" if record.get("parallel_mode") == "standard" else "patch",
        bit_flip_rate=float(recorded(record, "perturb_rate", 0.1 if dim <= 768 else 0.05)),
        label_drop_rate=float(recorded(record, "class_dropout_prob", 0.1)),
        head_repeats=recorded(record, "diff_batch_mul", 4),
    )


def class_conditional_record(config: ClassConditionalConfig) -> dict[str, Any]:
    """Inverse of `class_conditional_config`: the release's arguments, sizes among them."""
    head = flow_head_config(config.head)
    return {
        "n_layer": config.transformer.num_layers,
        "dim": config.transformer.dim,
        "n_head": config.transformer.num_heads,
        "diff_layers": head.num_blocks,
        "diff_dim": head.width,
        "diff_adanln_layers": head.num_groups,
        "latent_dim": config.tokenizer.bits,
        "resolution": config.image_size,
        "cls_token_num": config.class_tokens,
        "num_classes": config.num_classes,
        "parallel_num": config.tokens_per_step,
        "parallel_mode": "standard" if config.order == "token" else "patch",
        "perturb_rate": config.bit_flip_rate,
        "class_dropout_prob": config.label_drop_rate,
        "diff_batch_mul": config.head_repeats,
        **head_times_record(head),
        **tokenizer_record(config.tokenizer),
    }


def head_times(record: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded training times of the head, as fields of `FlowHeadConfig`.

    Raises:
      FileError: the distribution is unknown.
    """
    schedule = record.get("time_schedule") or TIME_SCHEDULES[0]
    if schedule not in TIME_SCHEDULES:
        known = ", ".join(TIME_SCHEDULES)
        raise FileError(f"the recorded time_schedule {short(schedule)} is none of: {known}")
    return {
        "time_distribution": schedule,
        "time_mean": float(recorded(record, "P_mean", -0.8)),
        "time_std": float(recorded(record, "P_std", 0.8)),
        "time_shift": float(recorded(record, "time_shift", 1.0)),
    }


def head_times_record(head: FlowHeadConfig) -> dict[str, Any]:
    """Inverse of `head_times`, with the names of the release."""
    return {
        "time_schedule": head.time_distribution,
        "P_mean": head.time_mean,
        "P_std": head.time_std,
        "time_shift": head.time_shift,
    }


def tokenizer_record(config: TokenizerConfig) -> dict[str, Any]:
    """A tokenizer's `ae_*_config.json` in the release's form."""
    sizes = {
        "double_z": False,
        "z_channels": config.bits,
        "in_channels": config.image_channels,
        "out_ch": config.image_channels,
        "ch": config.ch,
        "ch_mult": list(config.ch_mult),
        "num_res_blocks": config.num_res_blocks,
    }
    if config.attention_blocks:
        sizes |= {"attn_blocks": config.attention_blocks, "n_heads": config.attention_heads}
    if config.latents == "continuous":
        sizes["double_z"] = True
        return {
            "ddconfig": sizes,
            "embed_dim": config.bits,
            "scale_factor": config.latent_scale,
        }
    return {
        "ddconfig": sizes,
        "num_codebooks": config.num_codebooks,
        "gan_decoder": config.decoder == "gan",
    }


def differences(record: Mapping[str, Any], inferred: Mapping[str, Any]) -> list[str]:
    """Lists recorded sizes that differ from those of the tensors."""
    found = []
    for name, value in inferred.items():
        if isinstance(value, Mapping):
            inner = record.get(name)
            found += differences(inner if isinstance(inner, Mapping) else {}, value)
        elif record.get(name, value) != value:
            found.append(f"{name} {short(record[name])}, not {value}")
    return found


def published(config: ClassConditionalConfig) -> tuple[str, SamplerConfig] | None:
    """The name and the sampler in evaluation of the published model with these sizes, or None."""
    if not isinstance(config.head, FlowHeadConfig):
        return None
    for name, scale in GUIDANCE.items():
        preset = ClassConditionalConfig.imagenet(name)
        # Fields that matter in training only may differ.
        same_sizes = dataclasses.replace(
            preset,
            tokenizer=dataclasses.replace(
                preset.tokenizer, num_codebooks=config.tokenizer.num_codebooks
            ),
            head=dataclasses.replace(
                flow_head_config(preset.head),
                time_distribution=config.head.time_distribution,
                time_mean=config.head.time_mean,
                time_std=config.head.time_std,
            ),
            bit_flip_rate=config.bit_flip_rate,
            label_drop_rate=config.label_drop_rate,
            head_repeats=config.head_repeats,
        )
        if same_sizes == config:
            return f"BitDance_{name[0].upper()}{name[1:]}", SamplerConfig(
                head_steps=100, guidance_scale=scale, guidance_schedule="linear"
            )
    return None


def recorded(record: Mapping[str, Any], name: str, default: Any) -> Any:
    """A recorded number of the default's type, or the default.

    Raises:
      FileError: it is too large for any model, or NaN.
    """
    value = record.get(name, default)
    numbers = (int, float) if isinstance(default, float) else int
    if not isinstance(value, numbers) or isinstance(value, bool):
        return default
    if not abs(value) < LARGEST:
        raise FileError(f"the recorded {name} is {short(value)}, which is impossible")
    return value


def shape_of(shapes: Shapes, key: str, dimensions: int) -> tuple[int, ...]:
    """A tensor's shape; a FileError if it is missing or has other dimensions."""
    if key not in shapes:
        raise FileError(f"the key {key} is missing, which determines the model's sizes")
    if len(shapes[key]) != dimensions or 0 in shapes[key]:
        raise FileError(f"{key} has the shape {list(shapes[key])}, which is impossible")
    return shapes[key]


def count(shapes: Shapes, pattern: str) -> int:
    """One more than the largest number in the keys that match."""
    numbers = [match[1] for key in shapes if (match := re.fullmatch(pattern, key))]
    for number in numbers:
        if len(number) > 9 or int(number) >= len(shapes):
            raise FileError(
                f"a key like {pattern} has the number {number[:20]}, which is impossible"
            )
    return 1 + max(map(int, numbers), default=-1)
