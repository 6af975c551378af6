"""The paper's training recipe for ImageNet at 256 pixels (section 4.2), for `configs/imagenet_*.py`."""

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


def imagenet_training(model: str, guidance_scale: float) -> ClassConditionalTraining:
    """The config that trains a model of `ClassConditionalConfig.imagenet` on the official tar.

    Args:
      model: for example "b_1x".
      guidance_scale: the paper's for this model, with its linear schedule: for the image grids while
        training, and for the exported model.
    """
    return ClassConditionalTraining(
        run=RunConfig(
            workdir=f"runs/imagenet_{model}",
            steps=EPOCHS * TRAIN_IMAGES // BATCH_SIZE,
            compute_dtype="bfloat16",
            # The fastest on TPUs according to the plan (README): storing activations costs more than
            # computing them again.
            remat="nothing",
            log_every=100,
            save_every=5_000,
            preview_every=10_000,
        ),
        model=ClassConditionalConfig.imagenet(model),
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
