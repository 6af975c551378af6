import types
from pathlib import Path

import jax
import pytest

from bitdance_jax.config import TextToImageConfig
from bitdance_jax.errors import UserError
from bitdance_jax.sampling import memory
from bitdance_jax.sampling.memory import Setting


GIB = 2**30
RELEASED = TextToImageConfig.released("14b_64x")
ONE_PICTURE = Setting(RELEASED, "bfloat16", "bfloat16", (1, 1, 1), (1024, 1024), images=1, rows=2)


def device(gib: float) -> types.SimpleNamespace:
    return types.SimpleNamespace(platform="gpu", device_kind="NVIDIA X", memory_stats=lambda: {"bytes_limit": gib * GIB})


def gib(**changes) -> list[float]:
    return [part / GIB for part in memory.needed(Setting(**(vars(ONE_PICTURE) | changes)))]


def test_the_released_model():
    """14.77e9 parameters less lm_head, with head and decoder; 4160 slots of 160 KiB a row; 3 float32 pictures of 256 channels."""
    weights, cache, decoder = gib()
    assert 28 < weights < 31
    assert cache == pytest.approx(2 * (4160 * 160 / 2**20 + 2 * 4 * 40 * 64 * 4160 / GIB), rel=1e-6)
    assert decoder == pytest.approx(3)
    assert 15.5 < gib(weights="int8")[0] < 17.5
    assert gib(weights="float32")[0] == pytest.approx(2 * weights)


def test_what_devices_share():
    weights, cache, decoder = gib()
    cut = gib(mesh=(1, 1, 8))
    assert weights / 8 < cut[0] < weights / 8 + 0.5  # the decoder's weights are whole everywhere
    assert cut[1:] == pytest.approx([cache / 8, decoder / 8])
    assert gib(mesh=(2, 1, 1), images=2)[:2] == pytest.approx([weights, cache])


def test_too_little_is_a_line_that_says_what_fits():
    memory.check(ONE_PICTURE, device(40))
    with pytest.raises(UserError) as error:
        memory.check(ONE_PICTURE, device(22.5))
    assert "NVIDIA X has 22.5 GiB; what fits: --weights int8 (" in str(error.value)
    assert "--mesh.tensor 2 on 2 such devices (" in str(error.value)
    assert "512x512" not in str(error.value) and "--batch-size" not in str(error.value)
    with pytest.raises(UserError, match="take more devices, or larger ones"):
        memory.check(ONE_PICTURE, device(1))


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux alone says how much memory is free")
def test_memory_of_this_machine():
    assert memory.device_memory(jax.devices()[0]) > 0.01 * GIB
    tpu = types.SimpleNamespace(platform="tpu", device_kind="TPU v5e", memory_stats=lambda: None)
    assert memory.device_memory(tpu) == 16 * GIB
    tpu.device_kind = "TPU v99"
    assert memory.device_memory(tpu) is None
