"""The error of int8 weights: of one product, of a released layer, and of the recorded model."""

import functools

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from flax import traverse_util

from bitdance_jax.config import SamplerConfig
from bitdance_jax.models.prompt_rows import prefix_rows
from bitdance_jax.models.text_to_image import PatchReader, TextToImage, token_positions
from bitdance_jax.nn import linear, quantize
from bitdance_jax.nn.layers import FusedDense
from bitdance_jax.nn.quantize import Int8Kernel
from bitdance_jax.plan import hlo
from bitdance_jax.sampling import next_patch
from bitdance_jax.sampling.next_patch import resolve


def relative_error(actual, desired) -> float:
    """Root mean square of the difference over that of the desired values."""
    actual = np.asarray(actual, np.float32)
    desired = np.asarray(desired, np.float32)
    return float(np.sqrt(np.mean((actual - desired) ** 2) / np.mean(desired**2)))


def test_values_are_the_nearest_of_255_steps():
    kernel = jnp.array([[1.0, -0.5, 0.0], [-0.31, 0.25, 0.0], [0.004, 0.1, 0.0]])
    quantized = quantize.quantize(kernel)
    assert quantized.int8.dtype == jnp.int8 and quantized.scale.shape == (1, 3)
    np.testing.assert_array_equal(quantized.int8, [[127, -127, 0], [-39, 64, 0], [1, 25, 0]])
    np.testing.assert_allclose(quantized.scale[0, :2], [1 / 127, 0.5 / 127], rtol=1e-6)
    assert np.all(np.abs(quantized.int8 * quantized.scale - kernel) <= quantized.scale / 2 + 1e-9)


@pytest.mark.parametrize(
    "layer",
    [linear.Dense(7, dtype=jnp.float32), FusedDense(3, 5, use_bias=True)],
    ids=["dense", "fused"],
)
def test_layers_read_them(layer):
    """Layers with a quantized kernel compute as with its values, bias included."""
    x = jax.random.normal(jax.random.key(0), (2, 4, 6))
    params = layer.init(jax.random.key(1), x)["params"] | {
        "bias": jnp.ones((7,) if layer.features == 7 else (3, 5))
    }
    quantized = quantize.quantize(params["kernel"])
    expected = layer.apply({"params": params | {"kernel": quantized.int8 * quantized.scale}}, x)
    ours = layer.apply({"params": params | {"kernel": quantized}}, x)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_error_at_the_released_width():
    """127 steps are about 3.9 standard deviations of 5120 normal weights; the error is 0.9 %."""
    x = jax.random.normal(jax.random.key(0), (4, 5120))
    kernel = jax.random.normal(jax.random.key(1), (5120, 17408)) / 5120**0.5
    layer = linear.Dense(17408, use_bias=False, dtype=jnp.float32)
    read = jax.jit(lambda kernel, x: layer.apply({"params": {"kernel": kernel}}, x))
    error = relative_error(read(quantize.quantize(kernel), x), read(kernel, x))
    assert 0.005 < error < 0.011


def quantized_params(params: dict) -> dict:
    flat = traverse_util.flatten_dict(params, sep="/")
    small = {
        name: quantize.quantize(a) if quantize.QUANTIZED.search(name) else jnp.asarray(a)
        for name, a in flat.items()
    }
    assert sum(isinstance(a, Int8Kernel) for a in small.values()) > 10
    return traverse_util.unflatten_dict(small, sep="/")


def test_error_of_the_recorded_model():
    """With the recorded bits as input: states that the head reads, and how many bits are equal."""
    config, params, prompt = golden_models.text_to_image("t2i_4x")
    recorded = golden_models.read("t2i_4x/sample_nocfg")
    steps = range(prompt["height"] * prompt["width"] // config.size_multiple**2)
    noise = jnp.stack(
        [
            jnp.concatenate(
                [recorded[f"step{i}.init_noise"][None], recorded[f"step{i}.step_noise"]]
            )
            for i in steps
        ]
    )
    bits = jnp.stack([jnp.sign(recorded[f"step{i}.pre_sign"]) for i in steps])
    sampler = SamplerConfig(head_steps=prompt["num_sampling_steps"], guidance_scale=1.0)
    prefixes = prefix_rows(
        config, [prompt["cond_ids"]] * prompt["num_images"], prompt["height"], prompt["width"]
    )
    xy = jnp.asarray(token_positions(config, prompt["height"], prompt["width"]))
    solver, scales = resolve(sampler, config.head.time_shift, len(steps))

    @jax.jit
    def run(params):
        model = rounding.Replayed(PatchReader(TextToImage(config), params, prefixes, xy), bits)
        state = next_patch.begin(model, scales)
        noises = lambda patch, _: noise[patch]  # noqa: E731
        return next_patch.advance(
            model, state, len(steps), noise=noises, solver=solver, scales=scales
        )

    state = run(quantized_params(params))
    expected = np.stack([recorded[f"step{i}.cond"] for i in steps])
    equal = np.mean((np.asarray(state.values) > 0) == (np.asarray(bits) > 0))
    assert 1e-4 < relative_error(state.cache[1], expected) < 0.02
    assert equal > 0.97


def test_a_loop_converts_kernels_where_it_reads_them():
    """Not before the loop, or the weights of all layers would exist in the compute type at once."""
    layer = linear.Dense(512, use_bias=False, dtype=jnp.float32)
    kernels = [jax.eval_shape(quantize.quantize, jnp.zeros((512, 512)))] * 3

    def read(kernels, x):
        return functools.reduce(
            lambda x, kernel: jnp.tanh(layer.apply({"params": {"kernel": kernel}}, x)), kernels, x
        )

    def loop(kernels, x, stop):
        return jax.lax.fori_loop(0, stop, lambda _, x: read(kernels, x), x)

    module = hlo.parse(jax.jit(loop).lower(kernels, jnp.zeros((4, 512)), 3).compile().as_text())
    (turns,) = [
        instruction for instruction in module[module.entry] if instruction.opcode == "while"
    ]
    assert [shape.dtype for shape in hlo.leaves(turns.shape) if shape.dims == (512, 512)] == [
        "s8"
    ] * 3
