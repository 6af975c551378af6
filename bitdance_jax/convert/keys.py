"""From the release's state-dict keys to our parameter paths: one table per model.

A row is a regular expression for the release's key and the path it goes to, with the groups filled in. A path that ends in "weight" is a
norm's scale or a kernel, and becomes "scale" as it is, or "kernel" in our layout: torch's [out, in, h, w] as [h, w, in, out], [out, in] as
[in, out]. Every other array stays as it is.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from bitdance_jax.errors import UserError

Table = tuple[tuple[str, str], ...]

TOKENIZER: Table = (
    (r"(encoder|decoder)\.(conv_in|conv_out)\.(weight|bias)", r"\1/\2/\3"),
    (r"(encoder|decoder)\.norm_out\.(weight|bias)", r"\1/norm_out/\2"),
    (r"(encoder|decoder)\.mid_block\.(\d+)\.(norm1|norm2|conv1|conv2)\.(weight|bias)", r"\1/mid_\2/\3/\4"),
    (r"encoder\.down\.(\d+)\.block\.(\d+)\.(\w+)\.(weight|bias)", r"encoder/down_\1_block_\2/\3/\4"),
    (r"encoder\.down\.(\d+)\.downsample\.(weight|bias)", r"encoder/down_\1_downsample/\2"),
    (r"decoder\.adaptive\.(\d+)\.(gamma|beta)\.(weight|bias)", r"decoder/adaptive_\1/\2/\3"),
    (r"decoder\.up\.(\d+)\.block\.(\d+)\.(\w+)\.(weight|bias)", r"decoder/up_\1_block_\2/\3/\4"),
    (r"decoder\.up\.(\d+)\.upsample\.conv1\.(weight|bias)", r"decoder/up_\1_upsample/\2"),
)


_HEAD: Table = (
    (r"net\.time_embed\.mlp\.0\.(weight|bias)", r"time_embed/fc1/\1"),
    (r"net\.time_embed\.mlp\.2\.(weight|bias)", r"time_embed/fc2/\1"),
    (r"net\.(cond_embed|input_proj)\.(weight|bias)", r"\1/\2"),
    (r"net\.ada_ln_blocks\.(\d+)\.(weight|bias)", r"groups_\1/ada_ln/\2"),
    (r"net\.res_blocks\.(\d+)\.norm1\.(weight|bias)", r"block_\1/attention_norm/\2"),
    (r"net\.res_blocks\.(\d+)\.norm2?\.(weight|bias)", r"block_\1/mlp_norm/\2"),
    (r"net\.res_blocks\.(\d+)\.attn\.wqkv\.(weight|bias)", r"block_\1/attention/qkv/\2"),
    (r"net\.res_blocks\.(\d+)\.attn\.wo\.(weight|bias)", r"block_\1/attention/out/\2"),
    (r"net\.res_blocks\.(\d+)\.(w1|w2)\.(weight|bias)", r"block_\1/mlp/\2/\3"),
    (r"net\.final_layer\.ada_ln_modulation\.(weight|bias)", r"final_ada_ln/\1"),
    (r"net\.final_layer\.linear\.(weight|bias)", r"final_linear/\1"),
)


def convert(state: Mapping[str, np.ndarray], table: Table) -> dict[str, Any]:
    """The release's arrays as our nested parameters.

    Raises:
      UserError: listing every key that no row knows, and every path that two keys claim.
    """
    params: dict[str, Any] = {}
    problems: list[str] = []
    for key, array in state.items():
        path = target_path(key, table)
        if path is None:
            problems.append(f"unknown key {key}")
            continue
        *parents, leaf = path.split("/")
        node = params
        for part in parents:
            node = node.setdefault(part, {})
        if leaf == "weight":
            leaf, array = ("scale", array) if array.ndim == 1 else ("kernel", to_kernel(array))
        if leaf in node:
            problems.append(f"a second key for {path}: {key}")
        node[leaf] = array
    if problems:
        raise UserError("; ".join(problems))
    return params


def target_path(key: str, table: Table) -> str | None:
    """Where a release key goes, or None for a key that the table does not know."""
    for pattern, path in table:
        match = re.fullmatch(pattern, key)
        if match:
            return match.expand(path)
    return None


def to_kernel(array: np.ndarray) -> np.ndarray:
    """A torch weight, [out, in] or [out, in, h, w], as a Flax kernel, [in, out] or [h, w, in, out]."""
    return array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
