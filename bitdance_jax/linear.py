"""Flax's linear layers and embeddings, whose weights are gathered where they are used (`sharding.gathered`).

Left to the compiler, a kernel that is cut over "fsdp" along the axis that a product sums over makes it cut the activations likewise, or
turn each product into a ring of small ones; both cost TPUs several times the product (`python -m bitdance_jax.plan`).
"""

from typing import Any

import flax.linen as nn

from bitdance_jax import sharding


class _Gathered:
    def param(self, name: str, *arguments: Any, **keywords: Any) -> Any:
        array = super().param(name, *arguments, **keywords)  # type: ignore[misc]
        if name not in ("kernel", "embedding"):
            return array
        return sharding.gathered(array, "/".join((*self.path, name)), self.dtype)  # type: ignore[attr-defined]


class Dense(_Gathered, nn.Dense):
    """flax.linen.Dense."""


class DenseGeneral(_Gathered, nn.DenseGeneral):
    """flax.linen.DenseGeneral."""


class Conv(_Gathered, nn.Conv):
    """flax.linen.Conv."""


class Embed(_Gathered, nn.Embed):
    """flax.linen.Embed."""
