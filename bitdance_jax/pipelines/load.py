"""Any model of a folder or of the Hugging Face hub."""

import os
from typing import Any

from jax.typing import DTypeLike

from bitdance_jax.config import MeshConfig
from bitdance_jax.errors import ConfigError, FileError
from bitdance_jax.io import model_lookup
from bitdance_jax.io.model_lookup import EMBEDDED
from bitdance_jax.pipelines.class_conditional import ClassConditionalPipeline
from bitdance_jax.pipelines.hub_models import local_folder
from bitdance_jax.pipelines.pipeline import Pipeline
from bitdance_jax.pipelines.text_to_image import TextToImage
from bitdance_jax.pipelines.weights import WeightType


def load(
    folder: str | os.PathLike[str] = EMBEDDED,
    *,
    dtype: DTypeLike | None = None,
    mesh: MeshConfig | None = None,
    weights: WeightType | None = None,
    lora: str | os.PathLike[str] | None = None,
    lazy: bool = False,
) -> Pipeline:
    """The model of a folder, class-conditional or text to image.

    Args:
      folder: a model folder, local or gs://; the folder of a training run, finished or not;
        "emoji" and "emoji_classes", the embedded models; or a Hugging Face id, OWNER/REPOSITORY or
        OWNER/REPOSITORY/FILE, if no such folder exists: the model is downloaded and converted once,
        into `hub_models.cache_folder`.
      dtype: compute type; None: float32, of text-to-image models on accelerators bfloat16.
      mesh: how the devices share the work. None: one device; for text-to-image models all devices
        share every layer. `MeshConfig(data=-1)`: all devices, each with its own images.
      weights: the type that a text-to-image model's weights are stored in; None: `dtype`.
      lora: folder of an adapter of a text-to-image model, in PEFT's files, which is merged into the
        weights.
      lazy: of a text-to-image model, read the weights when they are first needed, so that `sample`
        refuses bad input at once.

    Raises:
      UserError: no such folder, damaged, or not a model that samples images.
    """
    folder = local_folder(folder)
    kind = model_lookup.read_config(folder).kind
    if kind == "language_model":
        raise FileError(
            f"{folder} holds a language model, which samples no images; train a text-to-image model"
            " from it, or give a model",
            folder,
        )
    if kind == "tokenizer":
        raise FileError(
            f"{folder} holds a tokenizer, which samples no images; "
            "load it by bitdance_jax.Tokenizer.load, or give a model",
            folder,
        )
    options: Any = {"dtype": dtype, "mesh": mesh}
    if kind == "text_to_image":
        return TextToImage.load(folder, weights=weights, lora=lora, lazy=lazy, **options)
    for name, value in (("weights", weights), ("lora", lora)):
        if value is not None:
            raise ConfigError(
                f"{folder} holds a class-conditional model; {name} belongs to text-to-image ones",
                name,
            )
    return ClassConditionalPipeline.load(folder, **options)
