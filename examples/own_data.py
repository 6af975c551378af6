"""A model of your own images: a folder with one sub-folder per class, and this config.

    python examples/own_data.py                                    # a toy folder, a few steps
    bitdance train examples/own_data.py --data.path images --model.image-size 64 --run.steps 5000

Training a tokenizer on the images first gives better ones: `bitdance train emoji_tokenizer` with
`--data.source folder --data.path images`. Here the embedded tokenizer encodes them.
"""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np

import bitdance_jax
from bitdance_jax.config import (
    ClassConditionalConfig,
    FlowHeadConfig,
    OptimizerConfig,
    RunConfig,
    SamplerConfig,
    TokenizerConfig,
    TransformerConfig,
)
from bitdance_jax.data.config import DataConfig
from bitdance_jax.io import image_files
from bitdance_jax.train import ClassConditionalTraining, train


def get_config() -> ClassConditionalTraining:
    return ClassConditionalTraining(
        run=RunConfig(workdir="runs/own_data", steps=4, log_every=2),
        model=ClassConditionalConfig(
            tokenizer=TokenizerConfig(
                bits=32, ch=32, ch_mult=(1, 1, 2, 4), num_res_blocks=1, num_codebooks=4
            ),
            transformer=TransformerConfig(num_layers=1, dim=64, num_heads=2),
            head=FlowHeadConfig(width=64, num_blocks=1, num_groups=1, head_dim=32),
            num_classes=2,  # `bitdance train` counts the sub-folders instead.
            image_size=32,
            tokens_per_step=4,
            class_tokens=1,
        ),
        tokenizer="emoji",
        data=DataConfig(source="folder", path="images", batch_size=8, cache_latents=True),
        optimizer=OptimizerConfig(warmup_steps=2),
        preview=SamplerConfig(head_steps=2, guidance_scale=2.0),
    )


def write_toy_folder(root: Path) -> None:
    """20 images in each of two classes: red and blue noise."""
    rng = np.random.default_rng(0)
    for channel, name in ((0, "red"), (2, "blue")):
        for number in range(20):
            image = rng.integers(0, 64, (32, 40, 3), dtype=np.uint8)
            image[..., channel] += 128
            image_files.save_png(root / name / f"{number}.png", image)


def main() -> None:
    config = get_config()
    with tempfile.TemporaryDirectory() as folder:
        images, workdir = Path(folder) / "images", Path(folder) / "run"
        write_toy_folder(images)
        config = dataclasses.replace(
            config,
            run=dataclasses.replace(config.run, workdir=str(workdir)),
            data=dataclasses.replace(config.data, path=str(images)),
        )
        train(config.make_task(), config)
        samples = bitdance_jax.load(workdir / "model").sample(["red", "blue"], progress=False)
        print("sampled images of shape", samples.shape)


if __name__ == "__main__":
    main()
