"""EfficientNet-Lite0's features of many images, which several benchmarks compare."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8
from tqdm import tqdm

from bitdance_jax.convert.perceptual import load_efficientnet
from bitdance_jax.io import image_files
from bitdance_jax.pipelines.batching import chunks
from bitdance_jax.tokenizer.efficientnet import pooled_features


BATCH = 64


class Lite0:
    """The network, compiled for one batch size."""

    def __init__(self) -> None:
        """
        Raises:
          FileError: the extra `perceptual`, which brings the weights, is not installed.
        """
        params = load_efficientnet()
        self._network: Any = jax.jit(
            lambda images: pooled_features(params, image_files.to_model(images))
        )

    def __call__(
        self, images: UInt8[np.ndarray, "N H W 3"], title: str = "features"
    ) -> Float[np.ndarray, "N D"]:
        """The 1,280 features of each image; shows progress where it takes seconds."""
        parts = tqdm(chunks(images, BATCH), title, -(-len(images) // BATCH), delay=2)
        return np.concatenate([np.asarray(self._network(part))[:count] for part, count in parts])
