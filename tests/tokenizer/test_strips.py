import functools
import math
from collections.abc import Callable
from pathlib import Path

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from golden_models import assert_close, nhwc
from jax.sharding import PartitionSpec as P
from jaxprs import operations
from random_params import random_params

from bitdance_jax.config import MeshConfig, TokenizerConfig
from bitdance_jax.distributed.mesh import AXES, make_mesh
from bitdance_jax.io.image_files import to_uint8
from bitdance_jax.pipelines import tokenizer as pipeline
from bitdance_jax.tokenizer import strips
from bitdance_jax.tokenizer.autoencoder import Autoencoder
from bitdance_jax.tokenizer.strips import Strips


strips_choose = strips.choose
SMALL = TokenizerConfig(bits=4, ch=32, ch_mult=(1, 2), num_res_blocks=1, decoder="gan")


def row_bytes(config: TokenizerConfig, codes: np.ndarray, bands: int) -> int:
    """Bytes of one row of every band at the finest level."""
    return 4 * len(codes) * bands * codes.shape[2] * config.downsampling * config.ch


@pytest.mark.parametrize(
    ("name", "bands", "rows"), [("tokenizer", 2, 5), ("tokenizer_gan", 4, 1)], ids=["plain", "gan"]
)
def test_the_release(name, bands, rows):
    """Strips of 5 of the 32 rows of two bands, then 2, and of 1 of the 16 of four bands."""
    config, params = golden_models.tokenizer(name)
    io = golden_models.read(f"{name}/io")
    codes = nhwc(io["codes"])
    noise = nhwc(io["noise"]) if "noise" in io else None
    split = Strips(bands, bytes=rows * row_bytes(config, codes, bands))
    model = Autoencoder(config)
    decode = jax.jit(functools.partial(strips.decode_in_strips, model, strips=split))
    lengths = {
        operation.equation.params["length"]
        for operation in operations(jax.make_jaxpr(decode)(params, codes, noise))
        if operation.equation.primitive.name == "scan"
    }
    assert codes.shape[1] * config.downsampling // bands // rows in lengths
    assert_close(decode(params, codes, noise), nhwc(io["reconstruction"]))


@functools.cache
def small() -> tuple[dict, jax.Array, jax.Array]:
    """Parameters, codes and noise of images of 16 x 6."""
    codes, noise = jax.random.normal(jax.random.key(0), (2, 2, 8, 3, 4))
    params = random_params(Autoencoder(SMALL), jnp.zeros((1, 2, 4, 3)), noise[:1, :1, :2])
    return params, jnp.sign(codes), noise


def plain(params: dict, codes: jax.Array, noise: jax.Array) -> jax.Array:
    return Autoencoder(SMALL).apply({"params": params}, codes, noise, method="decode")


def in_strips(split: Strips, dtype=jnp.float32) -> Callable[..., jax.Array]:
    return jax.jit(
        functools.partial(strips.decode_in_strips, Autoencoder(SMALL, dtype), strips=split)
    )


def test_bfloat16():
    split = Strips(2, bytes=4 * row_bytes(SMALL, small()[1], 2))
    assert_close(in_strips(split, jnp.bfloat16)(*small()), jax.jit(plain)(*small()), 0.05)


def test_choice():
    assert strips.choose((1, 32, 32, 4), 16) is None is strips.choose((100, 16, 64, 4), 16)
    assert strips.choose((1, 128, 128, 4), 16) == Strips(8)
    assert strips.choose((1, 36, 128, 4), 16) == Strips(4) == strips.choose((2, 128, 128, 4), 16)
    assert strips.choose((9, 33, 32, 4), 16) == Strips(1)
    assert strips.choose((1, 2, 2, 4), 16, ("data",)) == Strips(2, ("data",))


def test_decoding_chooses(monkeypatch):
    chosen = []
    monkeypatch.setattr(
        strips, "choose", lambda *arguments: chosen.append(strips_choose(*arguments)) or chosen[-1]
    )
    params, codes, _ = small()
    for factor in (1, 50, 100):
        large = jnp.tile(codes.astype(jnp.int8), (1, factor, factor, 1))
        keys = jax.random.split(jax.random.key(1), 2)
        jax.eval_shape(
            functools.partial(pipeline.decode_codes, Autoencoder(SMALL)),
            params,
            large,
            keys,
        )
    assert chosen == [None, None, Strips(4)]


@pytest.mark.slow
def test_on_meshes():
    """In another process, with eight devices."""
    processes.python([__file__], Path(__file__).parent, devices=8)


def on_eight_devices() -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    params, codes, noise = small()
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    by_rows = P(None, AXES)
    row_by_row = in_strips(Strips(1, AXES, row_bytes(SMALL, codes, 1)))
    sharded = jax.jit(
        jax.shard_map(
            row_by_row,
            mesh=mesh,
            in_specs=(P(), by_rows, by_rows),
            out_specs=by_rows,
            check_vma=False,
        )
    )
    assert_close(sharded(params, codes, noise), jax.jit(plain)(params, codes, noise))

    mesh = make_mesh(MeshConfig(data=1, tensor=4), jax.devices()[:4])
    keys = jax.random.split(jax.random.key(1), 2)
    noise = jnp.stack([jax.random.normal(key, codes.shape[1:]) for key in keys])
    expected = to_uint8(jax.jit(plain)(params, codes, noise)).astype(int)
    on_mesh = functools.partial(pipeline.decode_codes, Autoencoder(SMALL), mesh=mesh)
    arguments = params, codes.astype(jnp.int8), keys
    compiled = jax.jit(on_mesh).lower(*arguments).compile()
    assert compiled(*arguments).addressable_shards[0].data.shape == (2, 4, 6, 3)
    np.testing.assert_allclose(np.asarray(compiled(*arguments)).astype(int), expected, atol=1)
    gathered = [
        elements(line) for line in compiled.as_text().splitlines() if " all-gather(" in line
    ]
    assert gathered and max(gathered) <= codes.size
    six_rows = jax.eval_shape(on_mesh, params, codes[:, :6].astype(jnp.int8), keys)
    assert six_rows.shape == (2, 12, 6, 3)  # each device has them all


def elements(line: str) -> int:
    """Size of the result in a line of XLA's text: `... = f32[2,8]{1,0} all-gather(...)`."""
    return math.prod(int(size) for size in line.split("[")[1].split("]")[0].split(",") if size)


if __name__ == "__main__":
    on_eight_devices()
