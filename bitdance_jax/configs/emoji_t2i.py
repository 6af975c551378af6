"""The embedded text-to-image model: emoji of 128 pixels from their names, 4 tokens a step.

    bitdance train emoji_tokenizer
    bitdance train emoji_t2i

It starts from random weights and learns its prompt tokenizer from the captions. Minutes on a GPU.
`--trial` trains a smaller model in two minutes on a CPU, with the embedded tokenizer.
"""

from bitdance_jax.config import (
    FlowHeadConfig,
    ImageTokens,
    OptimizerConfig,
    Qwen3Config,
    RunConfig,
    TextToImageConfig,
)
from bitdance_jax.configs import emoji_tokenizer
from bitdance_jax.data.packing import Lengths
from bitdance_jax.io.model_lookup import EMBEDDED
from bitdance_jax.train.text_to_image_config import CAPTIONS, PackedDataConfig, PreviewConfig
from bitdance_jax.train.text_to_image_training import TextToImageTraining


VOCABULARY = 512
TOKENS_PER_STEP = 4


def get_config() -> TextToImageTraining:
    ids = ImageTokens.of_vocabulary(VOCABULARY, num_resolutions=16)
    return TextToImageTraining(
        run=RunConfig(
            workdir="runs/emoji_t2i",
            steps=5_000,
            compute_dtype="bfloat16",
            export_dtype="bfloat16",
            log_every=50,
            save_every=2_000,
            preview_every=2_000,
        ),
        model=TextToImageConfig.from_language_model(
            Qwen3Config(
                num_layers=6,
                dim=192,
                num_heads=6,
                num_kv_heads=2,
                head_dim=32,
                hidden_dim=480,
                vocab_size=VOCABULARY,
            ),
            emoji_tokenizer.get_config().model,
            TOKENS_PER_STEP,
            ids,
            FlowHeadConfig(width=192, num_blocks=3, num_groups=1, head_dim=32),
        ),
        tokenizer="runs/emoji_tokenizer/model",
        text_tokenizer=CAPTIONS,
        head_repeats=4,
        data=PackedDataConfig(
            paths=(EMBEDDED,),
            resolutions=(128,),
            batch_size=128,
            # One image a row: it has about 300 tokens with its caption.
            packing=Lengths(target=1, row=320, document=320, buffer=1),
            text_drop=0.1,
            workers=4,
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-3,
            warmup_steps=200,
            schedule="cosine",
            end_learning_rate=1e-5,
            ema_decay=0.999,
            ema_warmup=True,
        ),
        preview=PreviewConfig(head_steps=25, guidance_scale=3.0, guidance_schedule="constant"),
    )
