"""New rows of a language model's vocabulary.

They are drawn around the mean of the table with 1e-9 of its covariance, as Hugging Face's
Transformers adds tokens, so that they look like an average token to the layers that were trained.
"""

import math
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from bitdance_jax.errors import UserError


Params = dict[str, Any]

VARIANCE = 1e-9
"""Covariance of new rows as a multiple of the table's."""

BLOCK = 4096
"""Rows of the table that are converted to float32 at a time."""


def grow(params: Params, vocab_size: int, key: Array) -> Params:
    """The parameters of `Qwen3` with new rows in `embed_tokens` and `lm_head`.

    Args:
      params: arrays of any float type; stacked or unrolled.
      vocab_size: rows of the result.
      key: a new row depends on it, on its id and on the old rows, not on `vocab_size`.

    Returns:
      Both tables as float32 numpy arrays, because new rows differ by less than bfloat16 resolves;
      if none is new, `params`.

    Raises:
      UserError: the tables have more rows already.
    """
    rows = params["embed_tokens"]["embedding"].shape[0]
    if vocab_size < rows:
        raise UserError(f"the vocabulary has {rows} rows already, more than {vocab_size}")
    if vocab_size == rows:
        return params
    embedding = np.asarray(params["embed_tokens"]["embedding"])
    kernel = np.asarray(params["lm_head"]["kernel"])
    for_embedding, for_kernel = jax.random.split(key)
    grown = np.concatenate(
        [embedding, new_rows(embedding, vocab_size, for_embedding)], dtype=np.float32
    )
    grown_kernel = np.concatenate(
        [kernel, new_rows(kernel.T, vocab_size, for_kernel).T], axis=1, dtype=np.float32
    )
    return {
        **params,
        "embed_tokens": {"embedding": grown},
        "lm_head": {"kernel": grown_kernel},
    }


def new_rows(
    table: Float[np.ndarray, "V D"], vocab_size: int, key: Array
) -> Float[np.ndarray, "N D"]:
    """The rows from V up to `vocab_size`.

    With standard normal g of the table's V rows x, the sum of g (x - mean) / sqrt(V) has the
    table's covariance. So neither the covariance nor its root is computed, and one pass suffices.
    """
    rows, dim = table.shape
    ids = np.arange(rows, vocab_size)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, ids)
    normal = np.asarray(jax.vmap(lambda key: jax.random.normal(key, (rows,)))(keys))
    total = np.zeros(dim)
    weighted = np.zeros((len(ids), dim))
    for start in range(0, rows, BLOCK):
        block = table[start : start + BLOCK].astype(np.float32)
        total += block.sum(axis=0, dtype=np.float64)
        weighted += normal[:, start : start + BLOCK] @ block
    mean = total / rows
    centred = weighted - normal.sum(axis=1, dtype=np.float64)[:, None] * mean
    return (mean + math.sqrt(VARIANCE / rows) * centred).astype(np.float32)
