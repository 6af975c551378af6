"""BitDance (arXiv 2602.14041) in JAX: autoregressive image generation in binary tokens.

>>> import bitdance_jax
>>> model = bitdance_jax.load()  # the embedded emoji model, or a model folder
>>> images = model.sample(["Flags", 3], seed=0)  # uint8 [2, 64, 64, 3]
>>> codes = model.tokenizer.encode(images)  # int8 in {-1, 1}, [2, 8, 8, 32]
>>> again = model.tokenizer.decode(codes)

>>> model = bitdance_jax.TextToImage.load("models/14b_64x")
>>> images = model.generate("a cat on a mat", size="1024x1024", seed=0)  # uint8 [1, 1024, 1024, 3]
"""

import signal
import sys


if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # `python -m bitdance_jax.NAME`: until `command_line.run`, Ctrl-C ends the imports without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from bitdance_jax.config import (
    ClassConditionalConfig,
    MeshConfig,
    SamplerConfig,
    TextToImageConfig,
    TokenizerConfig,
)
from bitdance_jax.errors import ConfigError, FileError, ResourceError, UserError
from bitdance_jax.perf.libtpu import quiet_libtpu
from bitdance_jax.pipelines.class_conditional import ClassConditionalPipeline, Tokenizer
from bitdance_jax.pipelines.load import load
from bitdance_jax.pipelines.text_to_image import TextToImage


quiet_libtpu()  # before anything asks JAX for devices

__all__ = [
    "ClassConditionalConfig",
    "ClassConditionalPipeline",
    "ConfigError",
    "FileError",
    "MeshConfig",
    "ResourceError",
    "SamplerConfig",
    "TextToImage",
    "TextToImageConfig",
    "Tokenizer",
    "TokenizerConfig",
    "UserError",
    "load",
]
