"""The embedded model: class-conditional emoji, 4 tokens a step.

    bitdance train emoji_tokenizer
    bitdance train emoji_4x

About an hour on 2 CPU cores, after the tokenizer. `--trial` takes two minutes, and the embedded
tokenizer. `--head bitwise` and `--head token_classification` train it with another head.
"""

from typing import Literal

from bitdance_jax.config import (
    AugmentConfig,
    BitwiseHeadConfig,
    ClassConditionalConfig,
    FlowHeadConfig,
    HeadConfig,
    OptimizerConfig,
    RunConfig,
    SamplerConfig,
    TokenClassificationHeadConfig,
    TokenizerConfig,
    TransformerConfig,
)
from bitdance_jax.data.config import DataConfig
from bitdance_jax.train.class_conditional_training import ClassConditionalTraining


def get_config(
    head: Literal["diffusion", "bitwise", "token_classification"] = "diffusion",
) -> ClassConditionalTraining:
    """The config of a model.

    Args:
      head: "diffusion", or one of the ablations: "bitwise", or "token_classification" of groups of
        8 bits.
    """
    heads: dict[str, HeadConfig] = {
        "diffusion": FlowHeadConfig(width=192, num_blocks=3, num_groups=1, head_dim=32),
        "bitwise": BitwiseHeadConfig(width=192),
        "token_classification": TokenClassificationHeadConfig(width=192, groups=4),
    }
    suffix = "" if head == "diffusion" else f"_{head}"
    return ClassConditionalTraining(
        run=RunConfig(
            workdir=f"runs/emoji_4x{suffix}",
            steps=5000,
            export_dtype="bfloat16",
            log_every=20,
            save_every=500,
            preview_every=500,
        ),
        model=ClassConditionalConfig(
            tokenizer=TokenizerConfig(
                bits=32, ch=32, ch_mult=(1, 1, 2, 4), num_res_blocks=1, num_codebooks=4
            ),
            transformer=TransformerConfig(num_layers=6, dim=192, num_heads=6),
            head=heads[head],
            num_classes=9,
            image_size=64,
            tokens_per_step=4,
            class_tokens=4,
            bit_flip_rate=0.1,
            head_repeats=2,
        ),
        tokenizer="runs/emoji_tokenizer/model",
        data=DataConfig(
            source="emoji",
            batch_size=32,
            augment=AugmentConfig(min_crop=1.0, flip=0.0),
            cache_latents=True,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1.5e-3,
            warmup_steps=200,
            schedule="cosine",
            end_learning_rate=1e-5,
            ema_decay=0.998,
        ),
        preview=SamplerConfig(head_steps=50, guidance_scale=3.5, guidance_schedule="constant"),
    )
