"""Tables from the release's state-dict keys to our parameter paths, one per model.

A row has a regular expression for the release's key, and our path with the groups filled in. Each
group appears once and in the same order in both, so that a row can be inverted (`release_key`).

A path that ends in "weight" is a norm's scale or a kernel. It becomes "scale" unchanged, or
"kernel" in our layout: PyTorch's [out, in, h, w] is our [h, w, in, out], and [out, in] is
[in, out]. Where `parts` linear layers are fused, they get an axis of their own: [parts out, in] is
[in, parts, out], and a bias [parts out] is [parts, out]. Other arrays do not change, unless the row
has a function for it and its inverse.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange

from bitdance_jax.config import (
    ClassConditionalConfig,
    FlowHeadConfig,
    HeadConfig,
    TextToImageConfig,
    TokenizerConfig,
)
from bitdance_jax.errors import ConfigError, FileError


def _same(array: np.ndarray) -> np.ndarray:
    return array


class Row(NamedTuple):
    """One row of a table.

    Attributes:
      pattern: regular expression of the release's key.
      path: our path, with the groups of the pattern.
      parts: number of fused linear layers.
      change: a function of the release's array.
      undo: its inverse.
    """

    pattern: str
    path: str
    parts: int = 1
    change: Callable[[np.ndarray], np.ndarray] = _same
    undo: Callable[[np.ndarray], np.ndarray] = _same


Table = tuple[Row, ...]

CNN_TOKENIZER: Table = (
    Row(r"(encoder|decoder)\.(conv_in|conv_out|norm_out)\.(weight|bias)", r"\1/\2/\3"),
    Row(r"(encoder|decoder)\.mid_block\.(\d+)\.(\w+)\.(weight|bias)", r"\1/mid_\2/\3/\4"),
    Row(
        r"encoder\.down\.(\d+)\.block\.(\d+)\.(\w+)\.(weight|bias)",
        r"encoder/down_\1_block_\2/\3/\4",
    ),
    Row(r"encoder\.down\.(\d+)\.downsample\.(weight|bias)", r"encoder/down_\1_downsample/\2"),
    Row(r"decoder\.adaptive\.(\d+)\.(gamma|beta)\.(weight|bias)", r"decoder/adaptive_\1/\2/\3"),
    Row(r"decoder\.up\.(\d+)\.block\.(\d+)\.(\w+)\.(weight|bias)", r"decoder/up_\1_block_\2/\3/\4"),
    Row(r"decoder\.up\.(\d+)\.upsample\.conv1\.(weight|bias)", r"decoder/up_\1_upsample/\2"),
)

_LAYER = r"model\.layers\.(\d+)\."

QWEN3: Table = (
    Row(r"model\.embed_tokens\.weight", "embed_tokens/embedding"),
    Row(_LAYER + r"input_layernorm\.weight", r"layers_\1/attention_norm/weight"),
    Row(_LAYER + r"self_attn\.(q|k|v)_proj\.weight", r"layers_\1/attention/\2/weight"),
    Row(_LAYER + r"self_attn\.(q|k)_norm\.weight", r"layers_\1/attention/\2_norm/weight"),
    Row(_LAYER + r"self_attn\.o_proj\.weight", r"layers_\1/attention/out/weight"),
    Row(_LAYER + r"post_attention_layernorm\.weight", r"layers_\1/mlp_norm/weight"),
    Row(_LAYER + r"mlp\.(gate|up|down)_proj\.weight", r"layers_\1/mlp/\2/weight"),
    Row(r"model\.norm\.weight", "norm/weight"),
    Row(r"lm_head\.weight", "lm_head/weight"),
)
"""The table of a language model alone; layers are unrolled."""


_KL_LAYER = r"(\d+)\.(\w+)\.(weight|bias)"
KL_TOKENIZER: Table = (
    CNN_TOKENIZER[0],
    Row(r"encoder\.down\.(\d+)\.block\." + _KL_LAYER, r"encoder/down_\1_block_\2/\3/\4"),
    Row(r"decoder\.up\.(\d+)\.block\." + _KL_LAYER, r"decoder/up_\1_block_\2/\3/\4"),
    Row(r"encoder\.down\.(\d+)\.attn\." + _KL_LAYER, r"encoder/down_\1_attention_\2/\3/\4"),
    Row(r"decoder\.up\.(\d+)\.attn\." + _KL_LAYER, r"decoder/up_\1_attention_\2/\3/\4"),
    Row(r"encoder\.down\.(\d+)\.downsample\.conv\.(weight|bias)", r"encoder/down_\1_downsample/\2"),
    Row(r"decoder\.up\.(\d+)\.upsample\.conv\.(weight|bias)", r"decoder/up_\1_upsample/\2"),
    Row(r"(encoder|decoder)\.mid\.block_" + _KL_LAYER, r"\1/mid_\2/\3/\4"),
    Row(r"(encoder|decoder)\.mid\.attn_1\.(\w+)\.(weight|bias)", r"\1/mid_attention/\2/\3"),
    Row(r"quant_conv\.(weight|bias)", r"encoder/quant_conv/\1"),
    Row(r"post_quant_conv\.(weight|bias)", r"decoder/post_quant_conv/\1"),
)
"""Of latent diffusion's autoencoder, which MAR's files keep."""


def flow_head_config(config: HeadConfig) -> FlowHeadConfig:
    """The config of a binary diffusion head, the only head of the released layouts.

    Raises:
      ConfigError: it is another head.
    """
    if not isinstance(config, FlowHeadConfig):
        raise ConfigError(
            f"the released layouts have no {config.kind} head; only models with a binary diffusion"
            " head can be converted"
        )
    return config


def flow_head(head: HeadConfig, tokens_per_step: int, prefix: str = "") -> Table:
    """The rows of the head, for keys that start with `prefix` (a regular expression)."""
    config = flow_head_config(head)
    net = prefix + r"net\."
    rows = [
        Row(net + r"time_embed\.mlp\.0\.(weight|bias)", r"time_embed/fc1/\1"),
        Row(net + r"time_embed\.mlp\.2\.(weight|bias)", r"time_embed/fc2/\1"),
        Row(net + r"(cond_embed|input_proj)\.(weight|bias)", r"\1/\2"),
        Row(
            net + r"ada_ln_blocks\.(\d+)\.(weight|bias)",
            r"groups_\1/ada_ln/\2",
            parts=6 if tokens_per_step > 1 else 3,
        ),
        Row(net + r"final_layer\.ada_ln_modulation\.(weight|bias)", r"final_ada_ln/\1", parts=2),
        Row(net + r"final_layer\.linear\.(weight|bias)", r"final_linear/\1"),
    ]
    blocks = config.num_blocks // config.num_groups
    mlp_norm = "norm" if tokens_per_step == 1 else "norm2"
    first, second = ("w1", "w2") if config.use_swiglu else ("fc1", "fc2")
    for n in range(config.num_blocks):
        theirs = net + rf"res_blocks\.{n}\."
        ours = f"groups_{n // blocks}/blocks_{n % blocks}/"
        rows += [
            Row(theirs + r"norm1\.(weight|bias)", ours + r"attention_norm/\1"),
            Row(theirs + mlp_norm + r"\.(weight|bias)", ours + r"mlp_norm/\1"),
            Row(theirs + r"attn\.wqkv\.(weight|bias)", ours + r"attention/qkv/\1", parts=3),
            Row(theirs + r"attn\.wo\.(weight|bias)", ours + r"attention/out/\1"),
            Row(
                theirs + r"w1\.(weight|bias)",
                ours + rf"mlp/{first}/\1",
                parts=2 if config.use_swiglu else 1,
            ),
            Row(theirs + r"w2\.(weight|bias)", ours + rf"mlp/{second}/\1"),
        ]
    return tuple(rows)


def tokenizer(config: TokenizerConfig) -> Table:
    """The table of a tokenizer."""
    if config.latents == "continuous":
        return KL_TOKENIZER
    if not config.attention_blocks:
        return CNN_TOKENIZER
    block = r"(encoder|decoder)\.mid_attn_blocks\.(\d+)\."
    ours = r"\1/mid_attention/blocks_\2/"
    return (
        *CNN_TOKENIZER,
        Row(r"(encoder|decoder)\.register_token\.weight", r"\1/mid_attention/registers"),
        Row(block + r"attention_norm\.weight", ours + "attention_norm/weight"),
        Row(block + r"ffn_norm\.weight", ours + "mlp_norm/weight"),
        _qkv(block + r"attention\.wqkv\.weight", ours, num_heads=config.attention_heads),
        Row(block + r"attention\.wo\.weight", ours + "attention/out/weight"),
        Row(block + r"feed_forward\.w1\.weight", ours + "mlp/w1/weight", parts=2),
        Row(block + r"feed_forward\.w2\.weight", ours + "mlp/w2/weight"),
    )


def _qkv(pattern: str, path: str, *, num_heads: int) -> Row:
    """The row of a fused projection whose queries and keys are rotated."""

    def reorder(qkv: np.ndarray, order: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        q, k, v = np.split(qkv, 3)
        heads = [rearrange(w, "(n d) c -> c n d", n=num_heads) for w in (q, k)]
        q, k = (rearrange(order(w), "c n d -> (n d) c") for w in heads)
        return np.concatenate([q, k, v])

    return Row(
        pattern,
        path + "attention/qkv/weight",
        parts=3,
        change=functools.partial(reorder, order=pairs_to_halves),
        undo=functools.partial(reorder, order=halves_to_pairs),
    )


def class_conditional(config: ClassConditionalConfig) -> Table:
    """The table of a class-conditional model without its tokenizer; layers are unrolled."""
    head = tuple(
        row._replace(path=f"head/{row.path}")
        for row in flow_head(config.head, config.tokens_per_step, prefix=r"head\.")
    )
    return (
        Row(r"cls_embedding\.weight", "class_embedding/embedding"),
        Row(
            r"query_token",
            "query_tokens",
            change=lambda array: array[0],
            undo=lambda array: array[None],
        ),
        Row(r"pos_for_diff\.weight", "position_embedding"),
        Row(r"proj_in\.w1\.(weight|bias)", r"connector/w1/\1", parts=2),
        Row(r"proj_in\.w2\.(weight|bias)", r"connector/w2/\1"),
        Row(r"emb_norm\.weight", "transformer/embedding_norm/weight"),
        Row(r"norm\.weight", "transformer/norm/weight"),
        Row(
            r"layers\.(\d+)\.attention_norm\.weight", r"transformer/layers_\1/attention_norm/weight"
        ),
        Row(r"layers\.(\d+)\.ffn_norm\.weight", r"transformer/layers_\1/mlp_norm/weight"),
        _qkv(
            r"layers\.(\d+)\.attention\.wqkv\.weight",
            r"transformer/layers_\1/",
            num_heads=config.transformer.num_heads,
        ),
        Row(r"layers\.(\d+)\.attention\.wo\.weight", r"transformer/layers_\1/attention/out/weight"),
        Row(
            r"layers\.(\d+)\.feed_forward\.w1\.weight",
            r"transformer/layers_\1/mlp/w1/weight",
            parts=2,
        ),
        Row(r"layers\.(\d+)\.feed_forward\.w2\.weight", r"transformer/layers_\1/mlp/w2/weight"),
        *head,
    )


def text_to_image(config: TextToImageConfig) -> Table:
    """The table of a text-to-image model without its tokenizer; layers are unrolled.

    The keys are those of `release_folder.Release.tensors`.
    """
    head = flow_head(config.head, config.tokens_per_step, prefix=r"vision_head\.")
    return (
        *(row._replace(path=f"text/{row.path}") for row in QWEN3),
        Row(r"projector\.(fc[12])\.(weight|bias)", r"connector/\1/\2"),
        *(row._replace(path=f"head/{row.path}") for row in head),
    )


def pairs_to_halves(x: np.ndarray) -> np.ndarray:
    """Reorders the last axis for rotary positions.

    The release rotates the pairs (2i, 2i + 1), `nn.rope` the pairs (i, i + D/2).
    """
    return rearrange(x, "... (d pair) -> ... (pair d)", pair=2)


def halves_to_pairs(x: np.ndarray) -> np.ndarray:
    """Inverse of `pairs_to_halves`."""
    return rearrange(x, "... (pair d) -> ... (d pair)", pair=2)


def convert(state: Mapping[str, np.ndarray], table: Table) -> dict[str, Any]:
    """The release's arrays as our nested parameters, with unrolled layers.

    Raises:
      FileError: lists every unknown key, and every path that two keys lead to.
    """
    params: dict[str, Any] = {}
    problems: list[str] = []
    for key, array in state.items():
        row = next((row for row in table if re.fullmatch(row.pattern, key)), None)
        if row is None:
            problems.append(f"unknown key {key}")
            continue
        *parents, leaf = re.sub(row.pattern, row.path, key).split("/")
        node = params
        for part in parents:
            node = node.setdefault(part, {})
        if leaf == "weight":
            leaf = "scale" if array.ndim == 1 else "kernel"
        if leaf in node:
            problems.append(f"a second key for {'/'.join([*parents, leaf])}: {key}")
        node[leaf] = to_ours(array, row, leaf)
    if problems:
        raise FileError("; ".join(problems))
    return params


def release_key(path: str, table: Table) -> tuple[str, Row]:
    """The release's key of a path such as "transformer/layers_3/mlp/w1/kernel", and its row."""
    in_table = re.sub("/(scale|kernel)$", "/weight", path)
    for row in table:
        pattern, key = _inverse(row)
        if match := re.fullmatch(pattern, in_table):
            return key.format(*match.groups()), row
    raise ValueError(f"the key table has no row for {path}")


def to_ours(array: np.ndarray, row: Row, leaf: str) -> np.ndarray:
    """An array of the release as the parameter that ends in `leaf`."""
    array = row.change(array)
    if leaf == "kernel":
        array = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
    return array if row.parts == 1 else array.reshape(*array.shape[:-1], row.parts, -1)


def to_release(array: np.ndarray, row: Row, leaf: str) -> np.ndarray:
    """Inverse of `to_ours`."""
    if row.parts > 1:
        array = array.reshape(*array.shape[:-2], -1)
    if leaf == "kernel":
        array = array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)
    return row.undo(array)


@functools.cache
def _inverse(row: Row) -> tuple[str, str]:
    """A regular expression for our path, and the release's key as a format string."""
    groups = re.findall(r"\(.*?\)", row.pattern)
    path = re.sub(r"\\(\d)", lambda number: groups[int(number[1]) - 1], row.path)
    return path, re.sub(r"\(.*?\)", "{}", row.pattern).replace(r"\.", ".")
