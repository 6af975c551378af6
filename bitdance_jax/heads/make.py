"""The prediction heads by the types of their configs."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from bitdance_jax.config import (
    BitwiseHeadConfig,
    FlowHeadConfig,
    HeadConfig,
    TokenClassificationHeadConfig,
)
from bitdance_jax.heads.binary_diffusion import FlowHead
from bitdance_jax.heads.bitwise import BitwiseHead
from bitdance_jax.heads.protocols import Head
from bitdance_jax.heads.token_classification import TokenClassificationHead


HEADS: dict[type[HeadConfig], Callable[..., Head]] = {
    FlowHeadConfig: FlowHead,
    BitwiseHeadConfig: BitwiseHead,
    TokenClassificationHeadConfig: TokenClassificationHead,
}
"""A new head is registered here."""


def make_head(
    config: HeadConfig,
    *,
    bits: int,
    tokens_per_step: int,
    scan: bool = False,
    remat: str | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Any:
    """The head that a config describes: a `protocols.Head` and a Flax module.

    Args:
      config: see there.
      bits: K, bits of a token.
      tokens_per_step: P, tokens of a patch.
      scan: with stacked parameters and scanned blocks (training), or unrolled.
      remat: what the backward pass stores (`nn.stack.remat_policy`).
      dtype: compute type.
    """
    return HEADS[type(config)](config, bits, tokens_per_step, scan=scan, remat=remat, dtype=dtype)
