"""Every size and hyper-parameter, as frozen dataclasses.

`to_dict` and `from_dict` convert them to and from the JSON of a model folder's `config.json`.
"""

from bitdance_jax.config.data import AugmentConfig
from bitdance_jax.config.head import (
    BitwiseHeadConfig,
    FlowHeadConfig,
    HeadConfig,
    Latents,
    TokenClassificationHeadConfig,
)
from bitdance_jax.config.lora import LoraConfig
from bitdance_jax.config.model import ClassConditionalConfig, TokenizerConfig, TransformerConfig
from bitdance_jax.config.plain import Config, from_dict, to_dict
from bitdance_jax.config.sampler import SamplerConfig, TextSamplerConfig
from bitdance_jax.config.text_to_image import ImageTokens, Qwen3Config, TextToImageConfig
from bitdance_jax.config.training import (
    DiscriminatorConfig,
    HostsConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TokenizerLossConfig,
)
from bitdance_jax.errors import ConfigError


__all__ = [
    "AugmentConfig",
    "BitwiseHeadConfig",
    "ClassConditionalConfig",
    "Config",
    "ConfigError",
    "DiscriminatorConfig",
    "FlowHeadConfig",
    "HeadConfig",
    "HostsConfig",
    "ImageTokens",
    "Latents",
    "LoraConfig",
    "MeshConfig",
    "OptimizerConfig",
    "Qwen3Config",
    "RunConfig",
    "SamplerConfig",
    "TextSamplerConfig",
    "TextToImageConfig",
    "TokenClassificationHeadConfig",
    "TokenizerConfig",
    "TokenizerLossConfig",
    "TransformerConfig",
    "from_dict",
    "to_dict",
]
