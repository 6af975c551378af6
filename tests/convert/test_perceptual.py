"""Weights of perceptual networks, from files with the published keys."""

import jax
import numpy as np
import pytest
import safetensors.numpy
from vgg_weights import lpips_params

from bitdance_jax.convert import perceptual as weights
from bitdance_jax.errors import FileError
from bitdance_jax.tokenizer import efficientnet, perceptual


def vgg16_state() -> dict[str, np.ndarray]:
    """As torchvision's file: thirteen convolutions between ReLUs and poolings, and a classifier."""
    params = lpips_params()
    numbers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    state = {"classifier.0.weight": np.zeros((4, 4), np.float32)}
    for layer, number in enumerate(numbers):
        kernel = params[f"conv_{layer}"]["kernel"].transpose(3, 2, 0, 1)
        state[f"features.{number}.weight"] = np.ascontiguousarray(kernel)
        state[f"features.{number}.bias"] = params[f"conv_{layer}"]["bias"]
    return state


def test_vgg16_of_torchvision(tmp_path, monkeypatch):
    """The published linear layers come with the package; they are those of the recording."""
    expected = lpips_params()
    state = vgg16_state()
    safetensors.numpy.save_file(state, tmp_path / "vgg16.safetensors")
    params = weights.load_lpips(tmp_path / "vgg16.safetensors")
    jax.tree.map(np.testing.assert_array_equal, params, expected)

    del state["features.28.bias"]
    safetensors.numpy.save_file(state, tmp_path / "damaged.safetensors")
    with pytest.raises(FileError, match=r"missing features\.28\.bias"):
        weights.load_lpips(tmp_path / "damaged.safetensors")


def test_weights_of_another_network_are_refused_in_a_short_message(tmp_path):
    file = tmp_path / "lite0.safetensors"
    safetensors.numpy.save_file(efficientnet_state(), file)
    with pytest.raises(FileError, match="is not VGG16") as error:
        weights.load_lpips(file)
    assert "missing features.0.bias" in str(error.value)
    assert len(str(error.value)) < 1500 + len(str(file))


def test_vgg16_is_looked_up_in_the_cache_of_pytorch(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileError, match=weights.VGG16) as error:
        weights.load_lpips()
    assert error.value.path == str(tmp_path / "hub" / "checkpoints" / weights.VGG16)


def efficientnet_state() -> dict[str, np.ndarray]:
    """Random tensors with the published keys."""
    rng = np.random.default_rng(0)
    state = {}
    for names, (key, norm) in weights._efficientnet_layers().items():
        height, width, inputs, outputs = weights._at(efficientnet.abstract_params(), names)[
            "kernel"
        ].shape
        fan_in = height * width * inputs
        state[f"{key}.weight"] = rng.standard_normal((outputs, inputs, height, width)) / fan_in**0.5
        state[f"{norm}.weight"] = 1 + 0.1 * rng.standard_normal(outputs)
        state[f"{norm}.bias"] = 0.1 * rng.standard_normal(outputs)
        state[f"{norm}.running_mean"] = 0.1 * rng.standard_normal(outputs)
        state[f"{norm}.running_var"] = 1 + 0.5 * np.abs(rng.standard_normal(outputs))
        state[f"{norm}.num_batches_tracked"] = np.array(0)
    state["_fc.weight"] = rng.standard_normal((1000, 1280)) / 1280**0.5
    state["_fc.bias"] = rng.standard_normal(1000)
    return {key: np.asarray(value, np.float32) for key, value in state.items()}


def test_efficientnet_folds_its_batch_norms(tmp_path):
    state = efficientnet_state()
    safetensors.numpy.save_file(state, tmp_path / "lite0.safetensors")
    params = weights.load_efficientnet(tmp_path / "lite0.safetensors")
    shapes = jax.tree.map(lambda leaf: leaf.shape, params)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, efficientnet.abstract_params())

    # The convolution and the norm of the last layer, one after the other, on one pixel.
    x = np.random.default_rng(1).standard_normal(320)
    y = state["_conv_head.weight"][:, :, 0, 0] @ x - state["_bn1.running_mean"]
    y = y / np.sqrt(state["_bn1.running_var"] + 1e-3) * state["_bn1.weight"] + state["_bn1.bias"]
    np.testing.assert_allclose(
        x @ params["head"]["kernel"][0, 0] + params["head"]["bias"], y, rtol=1e-4, atol=1e-5
    )


def test_efficientnet_needs_its_package(monkeypatch):
    monkeypatch.setattr(weights, "EFFICIENTNET_PACKAGE", "no_such_package")
    with pytest.raises(FileError, match=r"bitdance_jax\[perceptual\]"):
        weights.load_efficientnet()


def test_the_distances_agree_on_what_is_alike(tmp_path):
    """A slightly noisy image is nearer than a very noisy one, to both networks."""
    safetensors.numpy.save_file(efficientnet_state(), tmp_path / "lite0.safetensors")
    lite0 = weights.load_efficientnet(tmp_path / "lite0.safetensors")
    image = jax.random.uniform(jax.random.key(0), (1, 32, 32, 3), minval=-1.0)
    noise = jax.random.normal(jax.random.key(1), image.shape)
    for distance, params in ((efficientnet.distance, lite0), (perceptual.lpips, lpips_params())):
        small = distance(params, image, image + 0.01 * noise)
        large = distance(params, image, image + 0.5 * noise)
        assert 0 < small < large
        assert distance(params, image, image) == 0
