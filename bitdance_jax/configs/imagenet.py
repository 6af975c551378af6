"""The paper's training recipe for ImageNet at 256 pixels (section 4.2).

    bitdance train imagenet_b_1x --data.path ILSVRC2012_img_train.tar
    bitdance train imagenet --model l --tokens-per-step 1 --data.path ILSVRC2012_img_train.tar

800 epochs on the bits of the tokenizer that was trained on ImageNet:
`bitdance convert shallowdream204/BitDance-ImageNet/ae_d16c32.pt models/ae_d16c32_imagenet`.
The paper's results (FID): B-1x 1.68, H-1x 1.24. `--trial` trains a small model on the embedded
images in two minutes.
"""

from typing import Literal

from bitdance_jax.config import (
    AugmentConfig,
    ClassConditionalConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    SamplerConfig,
)
from bitdance_jax.data.config import DataConfig
from bitdance_jax.train.class_conditional_training import ClassConditionalTraining


TRAIN_IMAGES = 1_281_167
EPOCHS = 800
BATCH_SIZE = 1024


GUIDANCE = {"b_1x": 3.2, "b_4x": 3.9, "b_16x": 6.1, "l_1x": 4.0, "h_1x": 4.55}
"""Guidance scales of the paper's models, with its linear schedule; others take that of B."""


def get_config(
    model: Literal["b", "l", "h"] = "b", tokens_per_step: Literal[1, 4, 16] = 1
) -> ClassConditionalTraining:
    """The config of a model of the paper's sizes.

    Args:
      model: B has 242M parameters, H 1008M.
      tokens_per_step: tokens that are predicted at a time.
    """
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
