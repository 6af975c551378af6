"""The embedded text-to-image model learns to edit: emoji of 128 pixels from an emoji and a text.

    bitdance train emoji_edit
    bitdance sample --checkpoint runs/emoji_edit --image emoji.png --prompt "make the skin dark"

It starts from the embedded model and trains on pairs of the embedded images (skin tone, hair, man,
woman, person) and, so that it keeps drawing from names alone, on the images with their captions;
`--data.edits.share` is the share of pairs. Minutes on a GPU. `--trial` trains a smaller model from
random weights in two minutes on a CPU, with the embedded tokenizer.
"""

import dataclasses

from bitdance_jax.configs import emoji_t2i
from bitdance_jax.data.edit_config import EditDataConfig
from bitdance_jax.data.emoji import SIDE
from bitdance_jax.data.packing import Lengths
from bitdance_jax.io.model_lookup import EMBEDDED
from bitdance_jax.train.text_to_image_training import TextToImageTraining


def get_config() -> TextToImageTraining:
    """The config; model and tokenizer are those of `emoji_t2i`."""
    replace = dataclasses.replace
    base = emoji_t2i.get_config()
    return replace(
        base,
        init=EMBEDDED,
        tokenizer=None,
        text_tokenizer=None,
        # Half of the patches of a pair are only read.
        head_repeats=2,
        run=replace(
            base.run,
            workdir="runs/emoji_edit",
            steps=2_500,
            save_every=1_000,
            preview_every=1_000,
        ),
        data=replace(
            base.data,
            batch_size=64,
            # A pair a row, or two captioned images.
            packing=Lengths(target=530, row=576, document=576, buffer=16),
            edits=EditDataConfig(paths=(EMBEDDED,), share=0.5, resolution=SIDE, text_drop=0.1),
            cache_latents=True,
        ),
        optimizer=replace(base.optimizer, learning_rate=1e-3, warmup_steps=100),
    )
