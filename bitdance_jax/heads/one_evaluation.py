"""What heads share whose loss needs no noise and that sample a patch in one evaluation."""

import flax.linen as nn
from jaxtyping import Array, Key

from bitdance_jax.heads.protocols import Solver


class OneEvaluation:
    """Methods of `protocols.Head` that such heads inherit before `nn.Module`."""

    @nn.nowrap
    def training_noise(self, keys: Key[Array, "2"], repeats: int, num_patches: int) -> tuple[()]:
        """Nothing: the loss is exact."""
        return ()

    def prepare(self, solver: Solver) -> None:
        """Nothing: patches share no computation."""
