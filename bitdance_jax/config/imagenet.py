"""The paper's training recipe for ImageNet at 256 pixels (paper 4.2), which the files `configs/imagenet_*.py` share."""

from bitdance_jax.config.data import AugmentConfig, DataConfig
from bitdance_jax.config.model import ClassConditionalConfig, SamplerConfig
from bitdance_jax.config.training import (
    ClassConditionalTraining,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
)


TRAIN_IMAGES = 1_281_167
EPOCHS = 800
BATCH_SIZE = 1024


def imagenet_training(model: str, guidance_scale: float) -> ClassConditionalTraining:
    """Trains a model of `ClassConditionalConfig.imagenet` on the official training tar.

    Args:
      model: "b_1x", for example.
      guidance_scale: the paper's for this model, linear; the grids are drawn with it, and it goes into the finished model folder.
    """
    return ClassConditionalTraining(
        run=RunConfig(
            workdir=f"runs/imagenet_{model}",
            steps=EPOCHS * TRAIN_IMAGES // BATCH_SIZE,
            compute_dtype="bfloat16",
            remat="nothing",  # The fastest on TPUs by the plan (README): what is kept costs more to write than to compute again.
            log_every=100,
            save_every=5_000,
            preview_every=10_000,
        ),
        model=ClassConditionalConfig.imagenet(model),
        # BitDance-ImageNet/ae_d16c32.pt. The general one of BitDance-Tokenizer has its sizes and other weights.
        tokenizer="models/ae_d16c32_imagenet",
        data=DataConfig(
            source="imagenet_tar",
            path="ILSVRC2012_img_train.tar",
            batch_size=BATCH_SIZE,
            augment=AugmentConfig(min_crop=0.8, flip=0.5, decay_start=700, decay_end=750),
            workers=8,
        ),
        # On one device or a thousand; README's plan says what is better on a large slice.
        mesh=MeshConfig(data=1, fsdp=-1),
        # The cosine is the release's default too; it begins right after the warm-up.
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
