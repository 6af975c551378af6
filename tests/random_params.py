"""Parameters for toy models without compiling an initialiser, and none of them zero, so that every path counts."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np


def random_params(model: nn.Module, *arguments: Any, **keywords: Any) -> dict[str, Any]:
    """Parameters of `model.init(key, *arguments, **keywords)`: kernels normal / sqrt(inputs), norm scales about 1, the rest about 0."""
    rng = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name, noise = path[-1].key, rng.standard_normal(leaf.shape)
        if name == "kernel":
            # Stacked layers have further axes in front, which are no inputs; nor are the parts of a fused layer (`layers.FusedDense`).
            fused = path[-2].key in ("qkv", "w1", "ada_ln", "final_ada_ln") and leaf.shape[-2] <= 6
            noise /= np.sqrt(
                np.prod(
                    leaf.shape[-4:-1] if "conv" in str(path) else leaf.shape[-3 if fused else -2]
                )
            )
        else:
            noise = 0.1 * noise + (name == "scale")
        return jax.numpy.asarray(noise, leaf.dtype)

    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *arguments, **keywords))["params"]
    return jax.tree_util.tree_map_with_path(draw, shapes)
