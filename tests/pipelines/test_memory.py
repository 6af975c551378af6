"""Estimates of the memory of text-to-image sampling."""

import dataclasses
import functools
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from bitdance_jax.config import TextToImageConfig, TokenizerConfig
from bitdance_jax.errors import ResourceError
from bitdance_jax.pipelines import memory
from bitdance_jax.pipelines.memory import Setting
from bitdance_jax.pipelines.text_to_image import RELEASED_SAMPLER
from bitdance_jax.pipelines.tokenizer import decode_codes
from bitdance_jax.tokenizer import strips
from bitdance_jax.tokenizer.autoencoder import Autoencoder, abstract_params


GIB = 2**30
RELEASED = TextToImageConfig.released("14b_64x")
ONE_IMAGE = Setting(
    RELEASED, "bfloat16", "bfloat16", (1, 1, 1), (1024, 1024), images=1, sampler=RELEASED_SAMPLER
)


def device(gib: float) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        platform="gpu", device_kind="NVIDIA X", memory_stats=lambda: {"bytes_limit": gib * GIB}
    )


def gib(**changes) -> list[float]:
    return [part / GIB for part in memory.needed(Setting(**(vars(ONE_IMAGE) | changes)))]


def test_the_released_model():
    """14.77e9 parameters without lm_head, 4160 slots of 160 KiB a row, images of 256 channels."""
    weights, sampling, decoder = gib()
    assert 28 < weights < 31
    # 51 evaluations for 128 tokens: 14 vectors of 5120 in bfloat16 each, twice
    assert sampling == pytest.approx(
        2 * (4160 * 160 / 2**20 + 2 * 4 * 40 * 64 * 4160 / GIB)
        + 2 * 51 * 128 * 14 * 5120 * 2 / GIB,
        rel=1e-6,
    )
    # With more evaluations, each one computes its own modulation.
    step = 2 * 128 * 14 * 5120 * 2 / GIB
    assert gib(sampler=dataclasses.replace(RELEASED_SAMPLER, head_steps=200))[1] == pytest.approx(
        sampling - 50 * step
    )
    assert gib(sampler=dataclasses.replace(RELEASED_SAMPLER, guidance_scale=1.0))[
        1
    ] == pytest.approx(sampling / 2)
    assert decoder == pytest.approx(2.25 / 2 + 4 * strips.STRIP_BYTES / GIB)
    assert 15.5 < gib(weights="int8")[0] < 17.5
    assert gib(weights="fp8") == gib(weights="int8")
    assert gib(weights="float32")[0] == pytest.approx(2 * weights)


def test_int4_fits_a_gpu_of_12_gb_and_a_machine_of_16_gb():
    """4.125 bits a weight, and the modulation of one evaluation at a time."""
    for name in ("14b_64x", "14b_16x"):
        config = TextToImageConfig.released(name)
        assert sum(gib(config=config, weights="int4")) * GIB < 12e9
        assert sum(gib(config=config, weights="int4", dtype="float32")) * GIB < 16e9
    stored = 8 * gib(weights="int4")[0] * GIB / (gib()[0] * GIB / 2)
    assert 4.125 < stored < 5
    with pytest.raises(ResourceError, match=r"what fits: weights='int4' \(11\.1 GiB\)"):
        memory.check(ONE_IMAGE, device(11.2))


def test_sharding():
    weights, sampling, decoder = gib()
    sharded = gib(mesh=(1, 1, 8))
    assert weights / 8 < sharded[0] < weights / 8 + 0.5  # The decoder's weights are replicated.
    # The scales of an embedding, 40 groups a row, cannot be split into 16.
    assert gib(weights="int4", mesh=(1, 1, 8))[0] < gib(weights="int4")[0] / 8 + 0.5
    assert gib(weights="int4", mesh=(1, 16, 1))[0] < gib(weights="int4")[0] / 8 + 0.5
    assert sharded[1:] == pytest.approx([sampling / 8, 3 / 2 / 8 + 4 * strips.STRIP_BYTES / GIB])
    # 65 rows of tokens cannot be sharded: every device decodes them.
    assert gib(mesh=(1, 1, 8), size=(1040, 1024))[2] > decoder
    assert gib(mesh=(2, 1, 1), images=2)[:2] == pytest.approx([weights, sampling])


def test_decoding():
    """Small images are decoded in chunks of a megapixel, without strips, in float32."""
    assert [gib(size=(512, 512), images=images)[2] for images in (1, 4, 5)] == pytest.approx(
        [0.75, 3, 3]
    )
    assert gib(size=(1024, 1024), images=4)[2] == gib()[2]
    assert gib(size=(0, 0), images=0)[2] == 0


def test_estimate_and_compiler():
    """Two images of half a GiB and some strips, where decoding without strips takes three."""
    tokenizer = TokenizerConfig(
        bits=RELEASED.tokenizer.bits, ch=32, ch_mult=(1, 1, 1), num_res_blocks=1
    )
    codes = jax.ShapeDtypeStruct((1, 512, 512, tokenizer.bits), jnp.int8)
    decode = jax.jit(functools.partial(decode_codes, Autoencoder(tokenizer)))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    planned = (
        decode.lower(abstract_params(tokenizer), codes, keys)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        / GIB
    )
    config = dataclasses.replace(RELEASED, tokenizer=tokenizer)
    estimate = gib(config=config, dtype="float32", size=(2048, 2048))[2]
    assert 1 < planned < estimate < 1.4


def test_too_little_memory():
    memory.check(ONE_IMAGE, device(40))
    with pytest.raises(ResourceError) as error:
        memory.check(ONE_IMAGE, device(22.5))
    message = str(error.value)
    assert "NVIDIA X has 22.5 GiB; what fits: weights='int8' (" in message
    assert "mesh.tensor=2 on 2 such devices (" in message
    assert "512x512" not in message
    assert "batch_size" not in message
    with pytest.raises(ResourceError, match=r"mesh\.tensor"):
        memory.check(ONE_IMAGE, device(1))


@pytest.mark.skipif(
    not Path("/proc/meminfo").exists(), reason="Linux alone says how much memory is free"
)
def test_memory_of_this_machine():
    assert memory.device_memory(jax.devices()[0]) > 0.01 * GIB
    tpu = types.SimpleNamespace(platform="tpu", device_kind="TPU v5e", memory_stats=lambda: None)
    assert memory.device_memory(tpu) == 16 * GIB
    tpu.device_kind = "TPU v99"
    assert memory.device_memory(tpu) is None
