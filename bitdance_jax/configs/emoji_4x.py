"""The embedded class-conditional model: emoji of 128 pixels in 97 classes, 4 tokens a step.

    bitdance train emoji_tokenizer
    bitdance train emoji_4x

Minutes on a GPU. `--trial` takes two on a CPU, with the embedded tokenizer. `--head bitwise` and
`--head token_classification` train it with another head.
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
    TransformerConfig,
)
from bitdance_jax.configs import emoji_tokenizer
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
        "diffusion": FlowHeadConfig(width=128, num_blocks=3, num_groups=1, head_dim=32),
        "bitwise": BitwiseHeadConfig(width=128),
        "token_classification": TokenClassificationHeadConfig(width=128, groups=4),
    }
    suffix = "" if head == "diffusion" else f"_{head}"
    return ClassConditionalTraining(
        run=RunConfig(
            workdir=f"runs/emoji_4x{suffix}",
            steps=4_000,
            compute_dtype="bfloat16",
            export_dtype="bfloat16",
            log_every=50,
            save_every=2_000,
            preview_every=2_000,
        ),
        model=ClassConditionalConfig(
            tokenizer=emoji_tokenizer.get_config().model,
            transformer=TransformerConfig(num_layers=4, dim=128, num_heads=4),
            head=heads[head],
            num_classes=97,
            image_size=128,
            tokens_per_step=4,
            class_tokens=1,
            bit_flip_rate=0.1,
            head_repeats=4,
        ),
        tokenizer="runs/emoji_tokenizer/model",
        data=DataConfig(
            source="emoji",
            batch_size=128,
            augment=AugmentConfig(min_crop=1.0, flip=0.0),
            cache_latents=True,
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-3,
            warmup_steps=200,
            schedule="cosine",
            end_learning_rate=1e-5,
            ema_decay=0.999,
            ema_warmup=True,
        ),
        preview=SamplerConfig(head_steps=25, guidance_scale=3.0, guidance_schedule="constant"),
    )
