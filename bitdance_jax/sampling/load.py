"""Any model of a model folder."""

import os

import jax.numpy as jnp
from jax.typing import DTypeLike

from bitdance_jax import model_folder
from bitdance_jax.sampling import pipeline
from bitdance_jax.sampling.pipeline import EMBEDDED, ClassConditionalPipeline, Tokenizer
from bitdance_jax.sampling.text_to_image import TextToImage


def load(folder: str | os.PathLike[str] = EMBEDDED, dtype: DTypeLike | None = None) -> Tokenizer | ClassConditionalPipeline | TextToImage:
    """The model of a model folder, local or gs://, or the embedded one, "emoji".

    Args:
      folder: see `bitdance_jax.model_folder`.
      dtype: compute type; the weights are kept in it too. float32 if left out; text-to-image models choose by the device.

    Raises:
      UserError: no such folder, damaged, or not a model of this package.
    """
    if str(folder) != EMBEDDED and model_folder.read_config(folder).kind == "text_to_image":
        return TextToImage.load(folder, dtype=dtype)
    return pipeline.load(folder, dtype or jnp.float32)
