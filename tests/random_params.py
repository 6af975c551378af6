"""Random parameters of toy models. None is zero, so that every path affects the results."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np


def random_params(model: nn.Module, *arguments: Any, **keywords: Any) -> dict[str, Any]:
    """Parameters like those of `model.init(key, *arguments, **keywords)`, without compiling it.

    Kernels are normal / sqrt(inputs), norm scales are around 1, and the rest is around 0.
    """
    rng = np.random.default_rng(0)

    def sample(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        noise = rng.standard_normal(leaf.shape)
        if name == "kernel":
            # The axes of stacked layers and of the parts of a fused layer (`FusedDense`) are not
            # inputs.
            fused = path[-2].key in ("qkv", "w1", "ada_ln", "final_ada_ln") and leaf.shape[-2] <= 6
            inputs = leaf.shape[-3 if fused else -2]
            if "conv" in str(path):
                inputs = np.prod(leaf.shape[-4:-1])
            noise /= np.sqrt(inputs)
        else:
            noise = 0.1 * noise + (name == "scale")
        return jax.numpy.asarray(noise, leaf.dtype)

    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *arguments, **keywords))["params"]
    return jax.tree_util.tree_map_with_path(sample, shapes)
