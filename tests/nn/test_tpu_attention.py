"""The fused kernel of TPUs, interpreted, against XLA's products."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pallas_on_cpu
import processes
import pytest

from bitdance_jax.nn import attention, rope, tpu_attention, tpu_attention_kernels
from bitdance_jax.nn.block import merge_heads, split_heads


def both(prefix, block, *, length, dim, num_heads, batch=1, dtype=jnp.float32):
    """Outputs and gradients of q, k and v by both kernels."""
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v, direction = (jax.random.normal(key, (batch, length, dim), dtype) for key in keys[:4])
    angles = jax.random.uniform(keys[4], (length, dim // num_heads // 2), maxval=6)
    rotary = jnp.cos(angles), jnp.sin(angles)

    def by_xla(q, k, v):
        q, k, v = (split_heads(x, num_heads) for x in (q, k, v))
        q, k = (rope.rotate(x, *rotary) for x in (q, k))
        return merge_heads(attention.attend(q, k, v, attention.BlockCausal(prefix, block)))

    def by_pallas(q, k, v):
        return tpu_attention.attend((q, k, v), rotary, prefix, block, num_heads)

    def results(function):
        @jax.jit
        def run(q, k, v, direction):
            out, pull = jax.vjp(function, q, k, v)
            return out, *pull(direction)

        return run(q, k, v, direction)

    return results(by_pallas), results(by_xla)


@pytest.mark.parametrize(
    ("prefix", "block", "length", "dim", "num_heads"),
    [
        # Two heads of the released size in a group, an odd length, and two chunks of queries.
        (9, 4, 139, 128, 2),
        # Groups of several heads, one of a single head, and all heads of a width without groups.
        pytest.param(63, 1, 141, 256, 4, marks=pytest.mark.slow),
        pytest.param(3, 16, 51, 256, 2, marks=pytest.mark.slow),
        pytest.param(0, 3, 20, 96, 3, marks=pytest.mark.slow),
    ],
)
def test_results_and_gradients_are_those_of_xla(monkeypatch, prefix, block, length, dim, num_heads):
    pallas_on_cpu.interpret(monkeypatch)
    ours, plain = both(prefix, block, length=length, dim=dim, num_heads=num_heads)
    for fused, expected in zip(ours, plain, strict=True):
        np.testing.assert_allclose(fused, expected, atol=5e-6)


@pytest.mark.parametrize(("prefix", "block"), [(9, 4), (63, 1), (0, 16)])
def test_chunks_see_as_many_keys_as_the_mask_says(prefix, block):
    mask = attention.block_causal_mask(319, prefix, block)
    rule = tpu_attention_kernels.Rule(prefix, block, head_dim=64)
    for rows, keys in tpu_attention_kernels.chunks(rule, 319):
        seen = mask[rows.slice]
        assert seen[:, keys - 1].any() and not seen[:, keys:].any()
        np.testing.assert_array_equal(
            tpu_attention_kernels._visible(rule, rows, keys).T, seen[:, :keys]
        )


SHARDED = """
import json

import jax
import pytest
import pallas_on_cpu

import nn.test_tpu_attention as single
from bitdance_jax.config import MeshConfig
from bitdance_jax.distributed.mesh import make_mesh

pallas_on_cpu.interpret(pytest.MonkeyPatch())
results = []
with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
    for num_heads in (2, 1):
        ours, plain = single.both(9, 4, length=20, dim=32, num_heads=num_heads, batch=4)
        error = max(float(abs(a - b).max()) for a, b in zip(ours, plain))
        results.append([error, [part.data.shape for part in ours[1].addressable_shards]])
print(json.dumps(results))
"""


@pytest.mark.slow
def test_each_device_has_its_images_and_heads():
    """Heads that the mesh does not divide are not split."""
    root = Path(__file__).parents[1]
    output = processes.python(["-c", SHARDED], root, devices=8)
    for (error, parts), features in zip(json.loads(output.splitlines()[-1]), (16, 32), strict=True):
        assert error < 5e-6
        assert parts == [[1, 20, features]] * 8
