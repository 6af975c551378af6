"""Any model of a model folder."""

import os

import jax.numpy as jnp
from jax.typing import DTypeLike

from bitdance_jax.config.plain import checked
from bitdance_jax.io import model_lookup, paths
from bitdance_jax.io.model_lookup import EMBEDDED
from bitdance_jax.pipelines import class_conditional as pipeline
from bitdance_jax.pipelines.class_conditional import ClassConditionalPipeline, Tokenizer
from bitdance_jax.pipelines.text_to_image import TextToImage


def load(
    folder: str | os.PathLike[str] = EMBEDDED, dtype: DTypeLike | None = None
) -> Tokenizer | ClassConditionalPipeline | TextToImage:
    """The model of a model folder, local or gs://, or the embedded one, "emoji".

    Args:
      folder: a model folder, or the folder of a training run, finished or not (`bitdance_jax.io.model_lookup`).
      dtype: compute type; the weights are kept in it too. float32 if left out; text-to-image models choose by the device.

    Raises:
      UserError: no such folder, damaged, or not a model of this package.
    """
    folder = paths.expand(checked(str, folder, "folder"))
    if model_lookup.read_config(folder).kind == "text_to_image":
        return TextToImage.load(folder, dtype=dtype)
    return pipeline.load(folder, dtype or jnp.float32)
