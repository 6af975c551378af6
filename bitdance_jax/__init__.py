"""BitDance (arXiv 2602.14041) in JAX: autoregressive image generation in binary tokens.

>>> import bitdance_jax
>>> model = bitdance_jax.load()  # the embedded emoji model, or a model folder
>>> pictures = model.sample(["Flags", 3], seed=0)  # uint8 [2, 64, 64, 3]
>>> codes = model.tokenizer.encode(pictures)  # int8 in {-1, 1}, [2, 8, 8, 32]
>>> again = model.tokenizer.decode(codes)
"""

from bitdance_jax.config import ClassConditionalConfig, SamplerConfig, TokenizerConfig
from bitdance_jax.errors import UserError
from bitdance_jax.sampling.pipeline import ClassConditionalPipeline, Tokenizer, load


__all__ = [
    "ClassConditionalConfig",
    "ClassConditionalPipeline",
    "SamplerConfig",
    "Tokenizer",
    "TokenizerConfig",
    "UserError",
    "load",
]
