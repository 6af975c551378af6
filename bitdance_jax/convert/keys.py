"""From the release's state-dict keys to our parameter paths: one table per model.

A row is a regular expression for the release's key, and where it goes: a path with the groups filled in, or a function of the match. A path
that ends in "weight" is a norm's scale or a kernel, and becomes "scale" as it is, or "kernel" in our layout: torch's [out, in, h, w] as
[h, w, in, out], [out, in] as [in, out]. Any other array stays as it is, unless the row says how to change it.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange

from bitdance_jax.config import ClassConditionalConfig, FlowHeadConfig
from bitdance_jax.errors import UserError


class Row(NamedTuple):
    pattern: str
    path: str | Callable[[re.Match[str]], str]
    change: Callable[[np.ndarray], np.ndarray] = lambda array: array


Table = tuple[Row, ...]

TOKENIZER: Table = (
    Row(r"(encoder|decoder)\.(conv_in|conv_out|norm_out)\.(weight|bias)", r"\1/\2/\3"),
    Row(r"(encoder|decoder)\.mid_block\.(\d+)\.(\w+)\.(weight|bias)", r"\1/mid_\2/\3/\4"),
    Row(r"encoder\.down\.(\d+)\.block\.(\d+)\.(\w+)\.(weight|bias)", r"encoder/down_\1_block_\2/\3/\4"),
    Row(r"encoder\.down\.(\d+)\.downsample\.(weight|bias)", r"encoder/down_\1_downsample/\2"),
    Row(r"decoder\.adaptive\.(\d+)\.(gamma|beta)\.(weight|bias)", r"decoder/adaptive_\1/\2/\3"),
    Row(r"decoder\.up\.(\d+)\.block\.(\d+)\.(\w+)\.(weight|bias)", r"decoder/up_\1_block_\2/\3/\4"),
    Row(r"decoder\.up\.(\d+)\.upsample\.conv1\.(weight|bias)", r"decoder/up_\1_upsample/\2"),
)


def flow_head(config: FlowHeadConfig, prefix: str = "") -> Table:
    """The head's rows, for keys that start with `prefix` (a regular expression)."""
    blocks = config.num_blocks // config.num_groups

    def block(rest: str) -> Callable[[re.Match[str]], str]:
        return lambda match: f"groups_{int(match[1]) // blocks}/blocks_{int(match[1]) % blocks}/" + match.expand(rest)

    return (
        Row(prefix + r"net\.time_embed\.mlp\.0\.(weight|bias)", r"time_embed/fc1/\1"),
        Row(prefix + r"net\.time_embed\.mlp\.2\.(weight|bias)", r"time_embed/fc2/\1"),
        Row(prefix + r"net\.(cond_embed|input_proj)\.(weight|bias)", r"\1/\2"),
        Row(prefix + r"net\.ada_ln_blocks\.(\d+)\.(weight|bias)", r"groups_\1/ada_ln/\2"),
        Row(prefix + r"net\.res_blocks\.(\d+)\.norm1\.(weight|bias)", block(r"attention_norm/\2")),
        Row(prefix + r"net\.res_blocks\.(\d+)\.norm2?\.(weight|bias)", block(r"mlp_norm/\2")),
        Row(prefix + r"net\.res_blocks\.(\d+)\.attn\.wqkv\.(weight|bias)", block(r"attention/qkv/\2")),
        Row(prefix + r"net\.res_blocks\.(\d+)\.attn\.wo\.(weight|bias)", block(r"attention/out/\2")),
        Row(prefix + r"net\.res_blocks\.(\d+)\.(w[12])\.(weight|bias)", block(r"mlp/\2/\3")),
        Row(prefix + r"net\.final_layer\.ada_ln_modulation\.(weight|bias)", r"final_ada_ln/\1"),
        Row(prefix + r"net\.final_layer\.linear\.(weight|bias)", r"final_linear/\1"),
    )


def class_conditional(config: ClassConditionalConfig) -> Table:
    """The class-conditional models, without the tokenizer; unrolled layers."""
    heads = config.transformer.num_heads

    def halves(qkv: np.ndarray) -> np.ndarray:
        q, k, v = np.split(qkv, 3)
        reorder = [rearrange(pairs_to_halves(rearrange(w, "(n d) c -> c n d", n=heads)), "c n d -> (n d) c") for w in (q, k)]
        return np.concatenate([*reorder, v])

    head = tuple(row._replace(path=_below("head", row.path)) for row in flow_head(config.head, prefix=r"head\."))
    return (
        Row(r"cls_embedding\.weight", "class_embedding/embedding"),
        Row(r"query_token", "query_tokens", lambda array: array[0]),
        Row(r"pos_for_diff\.weight", "position_embedding"),
        Row(r"proj_in\.(w[12])\.(weight|bias)", r"connector/\1/\2"),
        Row(r"emb_norm\.weight", "transformer/embedding_norm/weight"),
        Row(r"norm\.weight", "transformer/norm/weight"),
        Row(r"layers\.(\d+)\.attention_norm\.weight", r"transformer/layers_\1/attention_norm/weight"),
        Row(r"layers\.(\d+)\.ffn_norm\.weight", r"transformer/layers_\1/mlp_norm/weight"),
        Row(r"layers\.(\d+)\.attention\.wqkv\.weight", r"transformer/layers_\1/attention/qkv/weight", halves),
        Row(r"layers\.(\d+)\.attention\.wo\.weight", r"transformer/layers_\1/attention/out/weight"),
        Row(r"layers\.(\d+)\.feed_forward\.(w[12])\.weight", r"transformer/layers_\1/mlp/\2/weight"),
        *head,
    )


def pairs_to_halves(x: np.ndarray) -> np.ndarray:
    """Reorders the last axis from rotary pairs of neighbours (the release) to pairs (i, i + D/2) (`transformer.rope`)."""
    return rearrange(x, "... (d pair) -> ... (pair d)", pair=2)


def convert(state: Mapping[str, np.ndarray], table: Table) -> dict[str, Any]:
    """The release's arrays as our nested parameters.

    Raises:
      UserError: listing every key that no row knows, and every path that two keys claim.
    """
    params: dict[str, Any] = {}
    problems: list[str] = []
    for key, array in state.items():
        row = next((row for row in table if re.fullmatch(row.pattern, key)), None)
        if row is None:
            problems.append(f"unknown key {key}")
            continue
        *parents, leaf = _path(row, key).split("/")
        node = params
        for part in parents:
            node = node.setdefault(part, {})
        array = row.change(array)
        if leaf == "weight":
            leaf, array = ("scale", array) if array.ndim == 1 else ("kernel", to_kernel(array))
        if leaf in node:
            problems.append(f"a second key for {'/'.join([*parents, leaf])}: {key}")
        node[leaf] = array
    if problems:
        raise UserError("; ".join(problems))
    return params


def to_kernel(array: np.ndarray) -> np.ndarray:
    """A torch weight, [out, in] or [out, in, h, w], as a Flax kernel, [in, out] or [h, w, in, out]."""
    return array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)


def _path(row: Row, key: str) -> str:
    match = re.fullmatch(row.pattern, key)
    assert match is not None
    return match.expand(row.path) if isinstance(row.path, str) else row.path(match)


def _below(parent: str, path: str | Callable[[re.Match[str]], str]) -> str | Callable[[re.Match[str]], str]:
    return f"{parent}/{path}" if isinstance(path, str) else lambda match: f"{parent}/{path(match)}"
