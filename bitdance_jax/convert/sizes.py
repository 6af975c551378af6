"""Sizes of a released model from the shapes of its tensors. What shapes cannot tell comes from the arguments recorded with them."""

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
from bitdance_jax.errors import UserError, short


LARGEST = 1e18
"""A recorded number is smaller."""

Shapes = Mapping[str, tuple[int, ...]]

GUIDANCE = {"b_1x": 3.2, "b_4x": 3.9, "b_16x": 6.1, "l_1x": 4.0, "h_1x": 4.55}
"""The published class-conditional models and the guidance scales that they were evaluated with (paper 4.2)."""

TIME_SCHEDULES = ("logit_normal", "uniform")
"""Distributions of the head's training times, by the release's names, which are ours too; the default first."""

HEAD_DIM = 64
"""Of every released class-conditional model, in the transformer and in the head."""


def tokenizer_config(shapes: Shapes, record: Mapping[str, Any]) -> TokenizerConfig:
    """Sizes of a tokenizer.

    Args:
      shapes: of its state dict.
      record: its `ae_*_config.json`, if any; `num_codebooks` counts in training alone and is taken from there.

    Raises:
      UserError: a tensor that tells the sizes is missing.
    """
    ch, image_channels = shape_of(shapes, "encoder.conv_in.weight", 4)[:2]
    bits = shape_of(shapes, "encoder.conv_out.weight", 4)[0]
    decoder_inputs = shape_of(shapes, "decoder.conv_in.weight", 4)[1]
    levels = count(shapes, r"encoder\.down\.(\d+)\..*")
    widths = [
        shape_of(shapes, f"encoder.down.{level}.block.0.conv1.weight", 4)[0]
        for level in range(levels)
    ]
    sizes = TokenizerConfig(
        bits=bits,
        ch=ch,
        ch_mult=tuple(width // ch for width in widths),
        num_res_blocks=count(shapes, r"encoder\.down\.0\.block\.(\d+)\..*"),
        image_channels=image_channels,
        decoder="gan" if decoder_inputs == 2 * bits else "plain",
        num_codebooks=1,
    )
    released = {
        dataclasses.replace(preset, num_codebooks=1): preset
        for preset in (TokenizerConfig.d16c32(), TokenizerConfig.d32c128())
    }
    default = released.get(sizes, sizes).num_codebooks
    return dataclasses.replace(sizes, num_codebooks=recorded(record, "num_codebooks", default))


def class_conditional_config(
    shapes: Shapes, record: Mapping[str, Any], tokenizer: TokenizerConfig
) -> ClassConditionalConfig:
    """Sizes of a class-conditional model.

    Args:
      shapes: of its state dict, without the tokenizer.
      record: the release's arguments, as far as they are known.
      tokenizer: sizes of its tokenizer.

    Raises:
      UserError: a tensor that tells the sizes is missing, or they cannot be.
    """
    classes, class_width = shape_of(shapes, "cls_embedding.weight", 2)
    tokens, dim = shape_of(shapes, "pos_for_diff.weight", 2)
    width = shape_of(shapes, "head.net.input_proj.weight", 2)[0]
    grid = math.isqrt(tokens)
    if grid**2 != tokens or class_width % dim:
        raise UserError(
            f"pos_for_diff and cls_embedding cannot be of one model: [{tokens}, {dim}] and [{classes}, {class_width}]"
        )
    tokens_per_step = 1 + shape_of(shapes, "query_token", 3)[1] if "query_token" in shapes else 1
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
            use_swiglu=shape_of(shapes, "head.net.res_blocks.0.w1.weight", 2)[0]
            == 2 * int(1.5 * width),
            **head_times(record),
        ),
        num_classes=classes - 1,
        image_size=grid * tokenizer.downsampling,
        tokens_per_step=tokens_per_step,
        class_tokens=class_width // dim,
        order="token" if record.get("parallel_mode") == "standard" else "patch",
        bit_flip_rate=float(recorded(record, "perturb_rate", 0.1 if dim <= 768 else 0.05)),
        label_drop_rate=float(recorded(record, "class_dropout_prob", 0.1)),
        head_repeats=recorded(record, "diff_batch_mul", 4),
    )


def class_conditional_record(config: ClassConditionalConfig) -> dict[str, Any]:
    """The release's arguments for a model: what `class_conditional_config` reads beside the shapes, and the sizes."""
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
    """What a record says of the head's times, as fields of `FlowHeadConfig`.

    Raises:
      UserError: it names another distribution than those that are known.
    """
    schedule = record.get("time_schedule") or TIME_SCHEDULES[0]
    if schedule not in TIME_SCHEDULES:
        known = " and ".join(TIME_SCHEDULES)
        raise UserError(f"time_schedule {short(schedule)} is recorded, and only {known} are known")
    return {
        "time_distribution": schedule,
        "time_mean": float(recorded(record, "P_mean", -0.8)),
        "time_std": float(recorded(record, "P_std", 0.8)),
        "time_shift": float(recorded(record, "time_shift", 1.0)),
    }


def head_times_record(head: FlowHeadConfig) -> dict[str, Any]:
    """Inverse of `head_times`, in the release's names."""
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
    return {
        "ddconfig": sizes,
        "num_codebooks": config.num_codebooks,
        "gan_decoder": config.decoder == "gan",
    }


def differences(record: Mapping[str, Any], inferred: Mapping[str, Any]) -> list[str]:
    """Where the arguments recorded with a file say other sizes than its tensors have."""
    found = []
    for name, value in inferred.items():
        if isinstance(value, Mapping):
            inner = record.get(name)
            found += differences(inner if isinstance(inner, Mapping) else {}, value)
        elif record.get(name, value) != value:
            found.append(f"{name} {short(record[name])}, not {value}")
    return found


def published(config: ClassConditionalConfig) -> tuple[str, SamplerConfig] | None:
    """The name and the evaluation's sampler of the published model that has these sizes, if one has."""
    if not isinstance(config.head, FlowHeadConfig):
        return None
    for name, scale in GUIDANCE.items():
        preset = ClassConditionalConfig.imagenet(name)
        # What counts in training alone may differ.
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
    """A recorded number of the default's kind, or the default.

    Raises:
      UserError: it is too large for any model, or NaN.
    """
    value = record.get(name, default)
    numbers = (int, float) if isinstance(default, float) else int
    if not isinstance(value, numbers) or isinstance(value, bool):
        return default
    if not abs(value) < LARGEST:
        raise UserError(
            f"{name} is {short(value)} in what is recorded with the weights, which cannot be"
        )
    return value


def shape_of(shapes: Shapes, key: str, dimensions: int) -> tuple[int, ...]:
    """A tensor's shape; a UserError if there is none or it cannot be."""
    if key not in shapes:
        raise UserError(f"the key {key} is missing, which tells the model's sizes")
    if len(shapes[key]) != dimensions or 0 in shapes[key]:
        raise UserError(f"{key} has the shape {list(shapes[key])}, which cannot be")
    return shapes[key]


def count(shapes: Shapes, pattern: str) -> int:
    """One more than the largest number in the matching keys."""
    numbers = [match[1] for key in shapes if (match := re.fullmatch(pattern, key))]
    for number in numbers:
        if len(number) > 9 or int(number) >= len(shapes):
            raise UserError(f"a key like {pattern} has the number {number[:20]}, which cannot be")
    return 1 + max(map(int, numbers), default=-1)
