"""The paper's training recipe for ImageNet at 256 pixels (section 4.2).

    bitdance train imagenet_b_1x --data.path ILSVRC2012_img_train.tar
    bitdance train imagenet --model l --tokens-per-step 1 --data.path ILSVRC2012_img_train.tar
    bitdance train imagenet --ablation bitwise --data.path ILSVRC2012_img_train.tar

800 epochs on the bits of the tokenizer that was trained on ImageNet:
`bitdance convert shallowdream204/BitDance-ImageNet/ae_d16c32.pt models/ae_d16c32_imagenet`.
The paper's results (FID): B-1x 1.68, H-1x 1.24. `--trial` trains a small model on the embedded
images in two minutes.

The ablations (tables 12-14) train B for 400 epochs: `baseline` is the paper's method, the others
differ from it in what their name says. `continuous` needs MAR's tokenizer:
`bitdance convert kl16.ckpt models/kl16`.
"""

import dataclasses
from typing import Any, Literal

from bitdance_jax.config import (
    AugmentConfig,
    BitwiseHeadConfig,
    ClassConditionalConfig,
    ConfigError,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    SamplerConfig,
    TokenClassificationHeadConfig,
    TokenizerConfig,
)
from bitdance_jax.data.config import DataConfig
from bitdance_jax.train.class_conditional_training import ClassConditionalTraining


TRAIN_IMAGES = 1_281_167
EPOCHS = 800
ABLATION_EPOCHS = 400
BATCH_SIZE = 1024


GUIDANCE = {"b_1x": 3.2, "b_4x": 3.9, "b_16x": 6.1, "l_1x": 4.0, "h_1x": 4.55}
"""Guidance scales of the paper's models, with its linear schedule; others take that of B."""


Ablation = Literal[
    "none",
    "baseline",
    "token_classification",
    "bitwise",
    "causal",
    "token_raster",
    "continuous",
]


def get_config(
    model: Literal["b", "l", "h"] = "b",
    tokens_per_step: Literal[1, 4, 16] = 1,
    ablation: Ablation = "none",
) -> ClassConditionalTraining:
    """The config of a model of the paper's sizes.

    Args:
      model: B has 242M parameters, H 1008M.
      tokens_per_step: tokens that are predicted at a time.
      ablation: "token_classification" and "bitwise" are other heads, "causal" has no visibility
        within a patch, "token_raster" no patches, "continuous" real numbers in place of bits.

    Raises:
      ConfigError: an ablation that cannot fit, or makes no difference.
    """
    config = _recipe(model, tokens_per_step)
    return config if ablation == "none" else _ablated(config, ablation)


def _recipe(model: str, tokens_per_step: int) -> ClassConditionalTraining:
    name = f"{model}_{tokens_per_step}x"
    guidance_scale = GUIDANCE.get(name, GUIDANCE[f"b_{tokens_per_step}x"])
    return ClassConditionalTraining(
        run=RunConfig(
            workdir=f"runs/imagenet_{name}",
            steps=EPOCHS * TRAIN_IMAGES // BATCH_SIZE,
            compute_dtype="bfloat16",
            # The fastest on TPUs according to the plan: storing activations costs more than
            # computing them again.
            remat="nothing",
            log_every=100,
            save_every=5_000,
            preview_every=10_000,
        ),
        model=ClassConditionalConfig.imagenet(name),
        # BitDance-ImageNet/ae_d16c32.pt. BitDance-Tokenizer has another one of the same sizes.
        tokenizer="models/ae_d16c32_imagenet",
        data=DataConfig(
            source="imagenet_tar",
            path="ILSVRC2012_img_train.tar",
            batch_size=BATCH_SIZE,
            augment=AugmentConfig(min_crop=0.8, flip=0.5, decay_start=700, decay_end=750),
            workers=8,
        ),
        # Works on any number of devices; README's plan shows what is faster on many.
        mesh=MeshConfig(data=1, fsdp=-1),
        # The cosine schedule is the release's default too; it starts right after the warm-up.
        optimizer=OptimizerConfig(
            learning_rate=6e-4,
            warmup_steps=20_000,
            schedule="cosine",
            end_learning_rate=1e-5,
            b1=0.9,
            b2=0.95,
            weight_decay=0.05,
            clip_norm=1.0,
            ema_decay=0.9999,
        ),
        preview=SamplerConfig(
            head_steps=100, guidance_scale=guidance_scale, guidance_schedule="linear"
        ),
    )


def _ablated(config: ClassConditionalTraining, ablation: Ablation) -> ClassConditionalTraining:
    """The config of an ablation; the fading of crops keeps its place within the shorter run."""
    model = config.model
    width = model.transformer.dim
    changes: dict[str, Any] = {
        "baseline": {},
        "token_classification": {"head": TokenClassificationHeadConfig(width)},
        "bitwise": {"head": BitwiseHeadConfig(width)},
        "causal": {"mask": "causal"},
        "token_raster": {"order": "token"},
        "continuous": {"tokenizer": TokenizerConfig.kl16()},
    }
    if ablation in ("causal", "token_raster") and model.tokens_per_step == 1:
        raise ConfigError(
            f"ablation {ablation} makes no difference where a patch is one token; "
            "set tokens_per_step 4 or 16",
            "ablation",
        )
    crops = dataclasses.replace(config.data.augment, decay_start=350, decay_end=375)
    return dataclasses.replace(
        config,
        run=dataclasses.replace(
            config.run,
            workdir=f"{config.run.workdir}_{ablation}",
            steps=ABLATION_EPOCHS * TRAIN_IMAGES // BATCH_SIZE,
        ),
        model=dataclasses.replace(model, **changes[ablation]),
        tokenizer="models/kl16" if ablation == "continuous" else config.tokenizer,
        data=dataclasses.replace(config.data, augment=crops),
    )
