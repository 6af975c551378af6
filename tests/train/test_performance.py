"""Arithmetic of a step, speed, utilisation and memory."""

import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from tiny_models import MODEL, TOKENIZER

from bitdance_jax.config import RunConfig
from bitdance_jax.data.config import DataConfig
from bitdance_jax.distributed.mesh import make_mesh
from bitdance_jax.perf import hardware
from bitdance_jax.perf.flops import traced_flops
from bitdance_jax.tokenizer import autoencoder
from bitdance_jax.tokenizer.autoencoder import Autoencoder
from bitdance_jax.train import performance
from bitdance_jax.train.class_conditional_training import ClassConditionalTraining
from bitdance_jax.train.performance import Speedometer, memory, peak_flops, training_flops
from bitdance_jax.train.task import Objective


class TwoLayers(Objective):
    """A trained layer of 8 x 16 on a frozen one of 4 x 8, rematerialized and scanned three times,
    and a product of two trained factors."""

    def init(self, key):
        return {"kernel": jnp.zeros((8, 16)), "bias": jnp.zeros(16)}

    def abstract_frozen(self):
        return {"kernel": jax.ShapeDtypeStruct((4, 8), jnp.float32)}

    def abstract_batch(self, batch_size):
        return {"x": jax.ShapeDtypeStruct((batch_size, 4), jnp.float32)}

    def loss(self, params, frozen, batch, keys):
        x = batch["x"] @ frozen["kernel"] + jax.vmap(jax.random.normal)(keys)[:, None]

        @jax.checkpoint
        def layer(total, _):
            y = jnp.tanh(x @ params["kernel"] + params["bias"])
            return total + jnp.einsum("bi,bi->", y, y), None

        return jax.lax.scan(layer, 0.0, None, length=3)[0], {}


def test_what_trains_counts_three_times_less_the_gradients_that_nobody_asks_for():
    frozen, layer, square = 2 * 4 * 8, 2 * 8 * 16, 2 * 16
    # The trained layer's input does not depend on the parameters: forward, and the weights'
    # gradient.
    assert training_flops(TwoLayers(), 5) == 5 * (frozen + 3 * (2 * layer + 3 * square))


def class_conditional(data=DataConfig(), **run):
    config = ClassConditionalTraining(
        run=RunConfig(workdir="", steps=1, **run), model=MODEL, tokenizer="", data=data
    )
    return config.make_objective()


def test_what_a_step_computes_twice_or_in_a_fused_kernel_counts_once():
    flops = training_flops(class_conditional(), 4)
    assert training_flops(class_conditional(remat="nothing"), 4) == flops
    assert (
        training_flops(class_conditional(attention="cudnn", compute_dtype="bfloat16"), 4) == flops
    )
    assert training_flops(class_conditional(), 12) == 3 * flops


def test_the_frozen_encoder_counts_forward_only():
    encoder = autoencoder.abstract_params(TOKENIZER)["encoder"]
    images = jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.float32)
    forward = traced_flops(
        lambda p, x: Autoencoder(TOKENIZER).apply({"params": {"encoder": p}}, x, method="encode"),
        encoder,
        images,
    )
    assert (
        training_flops(class_conditional(), 4)
        - training_flops(class_conditional(DataConfig(source="tokens", path="tokens")), 4)
        == forward
        > 0
    )


def test_speed_and_utilisation(monkeypatch):
    clock = iter([100.0, 102.0, 110.0, 114.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    speed = Speedometer(batch_size=32, flops=3 * 10**12, peak=2e13)
    speed.restart(4)
    assert speed.read(4) == {}
    assert speed.read(8) == {
        "steps_per_second": 2.0,
        "images_per_second": 64.0,
        "model_flop_utilisation": pytest.approx(0.3),
    }
    speed.restart(8)
    assert speed.read(10)["images_per_second"] == 16.0


def test_an_unknown_peak_gives_no_utilisation():
    speed = Speedometer(batch_size=32, flops=10, peak=None)
    speed.restart(0)
    assert set(speed.read(1)) == {"steps_per_second", "images_per_second"}


def test_the_peak_is_that_of_all_devices(monkeypatch):
    mesh = make_mesh()
    assert peak_flops(mesh) is None
    monkeypatch.setattr(performance, "chip_of", lambda device: hardware.CHIPS[0])
    assert peak_flops(mesh) == hardware.CHIPS[0].flops * jax.device_count()


def test_memory_is_that_of_the_fullest_device():
    devices = [
        SimpleNamespace(
            memory_stats=lambda n=n: {"bytes_in_use": n * 2**30, "peak_bytes_in_use": 2 * n * 2**30}
        )
        for n in (1, 3)
    ]
    assert memory(devices) == {"memory_gib": 3.0, "peak_memory_gib": 6.0}
    assert (
        memory([SimpleNamespace(memory_stats=lambda: None)])
        == memory([SimpleNamespace(memory_stats=dict)])
        == {}
    )
