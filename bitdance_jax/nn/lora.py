"""Low-rank adapters (LoRA, arXiv 2106.09685): x W becomes x W + scale (x A) B.

A tree of adapters has the paths of the adapted layers. Beside a layer's "kernel" [L, C, *F] it has
"lora_a" [L, C, R] and "lora_b" [L, R, *F], where L are axes of stacked layers. In one tree with the
layer's own parameters (`attached`) the layers of `nn.linear` apply them. So neither W + scale A B
nor the gradient of W is ever computed; sampling merges them (`merged`).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float

from bitdance_jax.nn.stack import stacked_axes


Params = dict[str, Any]
Path = tuple[str, ...]

A = "lora_a"
B = "lora_b"


def initial(kernels: Mapping[Path, tuple[int, ...]], rank: int, key: Array) -> Params:
    """Adapters that change nothing yet, float32: A uniform within 1 / sqrt(inputs), B zero.

    Args:
      kernels: paths, which end in "kernel", and shapes of the adapted kernels.
      rank: R.
      key: of A.
    """
    adapters: dict[Path, Array] = {}
    for number, (path, shape) in enumerate(sorted(kernels.items())):
        *stack, inputs = shape[: stacked_axes(path) + 1]
        limit = inputs**-0.5
        drawn = jax.random.uniform(
            jax.random.fold_in(key, number), (*stack, inputs, rank), minval=-limit, maxval=limit
        )
        adapters[*path[:-1], A] = drawn
        adapters[*path[:-1], B] = jnp.zeros((*stack, rank, *shape[len(stack) + 1 :]))
    return traverse_util.unflatten_dict(adapters)


def attached(params: Params, adapters: Params, scale: float) -> Params:
    """Parameters with the adapters beside them; B is multiplied by the scale."""
    flat = traverse_util.flatten_dict(adapters)
    scaled = {path: scale * x if path[-1] == B else x for path, x in flat.items()}
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(params) | scaled)


def merged(
    kernel: Float[Array, "C *F"],
    a: Float[Array, "C R"] | Float[np.ndarray, "C R"],
    b: Float[Array, "R *F"] | Float[np.ndarray, "R *F"],
    scale: float | Float[Array, ""],
) -> Float[Array, "C *F"]:
    """The kernel W + scale A B of one layer, computed in float32 and in the kernel's type."""
    change = jnp.tensordot(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), axes=1)
    return (kernel.astype(jnp.float32) + scale * change).astype(kernel.dtype)
