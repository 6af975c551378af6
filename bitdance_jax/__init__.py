"""BitDance (arXiv 2602.14041) in JAX: autoregressive image generation in binary tokens.

>>> import bitdance_jax
>>> model = bitdance_jax.load()  # the embedded text-to-image model, or a model folder
>>> images = model.sample(["red heart", "pizza"], seed=0)  # uint8 [2, 128, 128, 3]
>>> codes = model.tokenizer.encode(images)  # int8 in {-1, 1}, [2, 16, 16, 32]
>>> again = model.tokenizer.decode(codes)

>>> model = bitdance_jax.load("emoji_classes")  # the embedded class-conditional model
>>> images = model.sample(["heart", 3], seed=0)  # uint8 [2, 128, 128, 3]
"""

import importlib
from typing import TYPE_CHECKING, Any

from bitdance_jax.perf.libtpu import quiet_libtpu
from bitdance_jax.version import __version__


if TYPE_CHECKING:
    from bitdance_jax.config import (
        ClassConditionalConfig,
        MeshConfig,
        SamplerConfig,
        TextToImageConfig,
        TokenizerConfig,
    )
    from bitdance_jax.errors import ConfigError, FileError, ResourceError, UserError
    from bitdance_jax.pipelines.class_conditional import ClassConditionalPipeline
    from bitdance_jax.pipelines.given_images import Given
    from bitdance_jax.pipelines.load import load
    from bitdance_jax.pipelines.pipeline import Pipeline
    from bitdance_jax.pipelines.text_to_image import TextToImage
    from bitdance_jax.pipelines.tokenizer import Tokenizer
    from bitdance_jax.pipelines.weighted import Weighted

_MODULES = {
    "bitdance_jax.config": (
        "ClassConditionalConfig",
        "MeshConfig",
        "SamplerConfig",
        "TextToImageConfig",
        "TokenizerConfig",
    ),
    "bitdance_jax.errors": ("ConfigError", "FileError", "ResourceError", "UserError"),
    "bitdance_jax.pipelines.class_conditional": ("ClassConditionalPipeline",),
    "bitdance_jax.pipelines.given_images": ("Given",),
    "bitdance_jax.pipelines.load": ("load",),
    "bitdance_jax.pipelines.pipeline": ("Pipeline",),
    "bitdance_jax.pipelines.text_to_image": ("TextToImage",),
    "bitdance_jax.pipelines.tokenizer": ("Tokenizer",),
    "bitdance_jax.pipelines.weighted": ("Weighted",),
}
"""Where the names of `__all__` are; imported on first use, so that `bitdance --help` is quick."""

__all__ = [
    "ClassConditionalConfig",
    "ClassConditionalPipeline",
    "ConfigError",
    "FileError",
    "Given",
    "MeshConfig",
    "Pipeline",
    "ResourceError",
    "SamplerConfig",
    "TextToImage",
    "TextToImageConfig",
    "Tokenizer",
    "TokenizerConfig",
    "UserError",
    "Weighted",
    "__version__",
    "load",
]

quiet_libtpu()  # before anything asks JAX for devices


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            value = getattr(importlib.import_module(module), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
