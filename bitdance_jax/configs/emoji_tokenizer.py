"""The embedded tokenizer: emoji of 64 pixels to 8x8 tokens of 32 bits.

    bitdance train emoji_tokenizer
    bitdance train emoji_tokenizer --latents continuous

About 40 minutes on 2 CPU cores, with `--trial` one.
"""

from bitdance_jax.config import (
    AugmentConfig,
    Latents,
    OptimizerConfig,
    RunConfig,
    TokenizerConfig,
    TokenizerLossConfig,
)
from bitdance_jax.data.config import DataConfig
from bitdance_jax.train.tokenizer_training import TokenizerTraining


def get_config(latents: Latents = "bits") -> TokenizerTraining:
    """The config of a tokenizer.

    Args:
      latents: "bits", 32 for each token, or "continuous", 8 real numbers.
    """
    is_bits = latents == "bits"
    return TokenizerTraining(
        run=RunConfig(
            workdir="runs/emoji_tokenizer" if is_bits else "runs/emoji_tokenizer_continuous",
            steps=3000,
            log_every=20,
            save_every=500,
            preview_every=500,
        ),
        model=TokenizerConfig(
            bits=32 if is_bits else 8,
            ch=32,
            ch_mult=(1, 1, 2, 4),
            num_res_blocks=1,
            num_codebooks=4,
            latents=latents,
        ),
        image_size=64,
        data=DataConfig(
            source="emoji", batch_size=16, augment=AugmentConfig(min_crop=0.9, flip=0.5)
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-3,
            warmup_steps=100,
            schedule="cosine",
            end_learning_rate=2e-5,
            weight_decay=0.0,
            ema_decay=0.995,
        ),
        loss=TokenizerLossConfig(l1=0.5, l2=1.0, entropy=0.01, commitment=0.02),
    )
