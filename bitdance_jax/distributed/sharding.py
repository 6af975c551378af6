"""The rule table: the mesh axes of every parameter, by its path.

Models never name mesh axes. Whatever has the shape of a parameter (gradients, EMA, optimizer state)
is sharded like it. An objective may add rules of its own (`train.task.Objective.sharding_rules`),
which come before the table.
"""

import math
import re
import warnings
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bitdance_jax.distributed.mesh import FSDP, TENSOR, AnyMesh, axis_names, num_parts
from bitdance_jax.errors import ConfigError


Rules = tuple[tuple[str, P], ...]
"""Patterns for the end of a parameter's path, each with the mesh axes of the parameter's last axes.
The first rule that matches applies. Axes in front, such as that of stacked layers, are not
split."""

RULES: Rules = (
    # A layer that widens is split along its outputs, one that narrows along its inputs: between
    # the two, activations are sharded over "tensor" without communication.
    (r"(qkv|w1|ada_ln|final_ada_ln)/kernel", P(FSDP, None, TENSOR)),
    # So are the codes of a softmax: its sums over "tensor" have one number a token.
    (r"(fc1|cond_embed|q|k|v|gate|up|code_logits)/kernel", P(FSDP, TENSOR)),
    (r"(out|w2|fc2|down)/kernel", P(TENSOR, FSDP)),
    (r"final_linear/kernel", P(FSDP, None)),
    (r"input_proj/kernel", P(None, FSDP)),
    (r"class_embedding/embedding", P(None, (FSDP, TENSOR))),
    # Only the width is split: the released vocabulary, 151988, is 4 x 37997.
    (r"embed_tokens/embedding", P(None, (FSDP, TENSOR))),
    (r"lm_head/kernel", P((FSDP, TENSOR), None)),
    (r"position_embedding|query_tokens", P(None, FSDP)),
    # Low-rank adapters are split like the kernel beside them, along one of its axes.
    (r"(qkv|w1|ada_ln|final_ada_ln)/lora_b", P(None, None, TENSOR)),
    (r"(fc1|cond_embed|q|k|v|gate|up)/lora_b", P(None, TENSOR)),
    (r"(out|w2|fc2|down)/lora_a", P(TENSOR, None)),
    (r"(out|w2|fc2|down)/lora_b", P(None, FSDP)),
    (r"lora_a", P(FSDP, None)),
    (r"lora_b", P()),
    # The tokenizer: convolutions [h, w, in, out], and its adaptive norms.
    (
        r"(conv\w*|\w*quant_conv|proj_out|nin_shortcut|\w+_(down|up)sample)/kernel",
        P(None, None, FSDP, TENSOR),
    ),
    (r"(gamma|beta)/kernel", P(None, FSDP)),
    (r"bias|scale|registers", P()),
)

LARGE = 2**20
"""A parameter of more elements than this (4 MiB in float32) must be sharded by a rule. A smaller
one may be replicated, if no rule matches it or an axis does not divide it: the copies cost
little."""

extra_rules: Any = jax.make_user_context(default_value=())
"""Context manager: the Rules that come before RULES in what is traced inside (an objective's)."""


def shardings(mesh: Mesh, tree: Any, rules: Rules = ()) -> Any:
    """The sharding of each array of a tree.

    Args:
      mesh: the devices.
      tree: arrays or shapes: nested dicts of parameters, or states of them (training state, optax
        state). Arrays outside any dict (steps, counters) are replicated.
      rules: to be tried before RULES.

    Raises:
      ConfigError: a large parameter has no rule, or is not divisible by its mesh axes.
    """

    def of_leaf(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = "/".join(str(part.key) for part in path if isinstance(part, jax.tree_util.DictKey))
        spec = parameter_spec(mesh, name, leaf.shape, rules=rules) if name else P()
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def parameter_spec(mesh: AnyMesh, name: str, shape: tuple[int, ...], *, rules: Rules = ()) -> P:
    """The mesh axes of the parameter at a path such as "transformer/layers/mlp/w1/kernel".

    Warns once about a small parameter that no rule matches; it is replicated. Raises as
    `shardings`.
    """
    spec = _find(name, (*rules, *extra_rules.value, *RULES))
    if spec is None:
        return _without_rule(name, shape)
    if len(spec) > len(shape):
        raise ConfigError(f"the sharding rule of {name} has more axes than its shape {list(shape)}")
    axes = [None] * (len(shape) - len(spec)) + list(spec)
    for i, (names, size) in enumerate(zip(axes, shape, strict=True)):
        parts = num_parts(mesh, names)
        if size % parts == 0:
            continue
        if math.prod(shape) > LARGE:
            fields = " x ".join(f"mesh.{axis}" for axis in axis_names(names))
            raise ConfigError(
                f"{name} {list(shape)} cannot be split into {parts} parts; "
                f"make {fields} a divisor of {size}",
                field="mesh",
            )
        axes[i] = None
    return P(*axes)


def part_spec(mesh: AnyMesh, name: str, shape: tuple[int, ...], part: tuple[int, ...]) -> P:
    """The mesh axes of an array that belongs to a parameter, such as its scales.

    Args:
      mesh, name, shape: of the parameter, as `parameter_spec`.
      part: shape of the array, of the same rank. What the mesh axes do not divide is not split.
    """
    spec = parameter_spec(mesh, name, shape)
    axes = [*spec, *[None] * (len(part) - len(spec))]
    return P(
        *(
            None if size % num_parts(mesh, names) else names
            for names, size in zip(axes, part, strict=True)
        )
    )


def _find(name: str, rules: Rules) -> P | None:
    return next((spec for pattern, spec in rules if re.search(rf"(^|/)({pattern})$", name)), None)


def _without_rule(name: str, shape: tuple[int, ...]) -> P:
    message = f"no sharding rule matches the parameter {name} {list(shape)}"
    if math.prod(shape) > LARGE:
        raise ConfigError(
            f"{message}; add one to the objective's sharding_rules or to "
            "bitdance_jax.distributed.sharding.RULES"
        )
    warnings.warn(f"{message}: every device holds a copy of it", stacklevel=2)
    return P()


def put(mesh: Mesh, params: Any, rules: Rules = ()) -> Any:
    """Parameters on the devices (see `shardings`), from complete numpy arrays on every process, or
    from StoredArrays, which every process reads in part."""
    return jax.tree.map(
        lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda i: x[i]),
        params,
        shardings(mesh, params, rules),
    )
