"""The error of quantized weights: of one product, of a wide layer, and of the recorded model."""

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
from bitdance_jax.nn.quantize import FORMATS, Quantized
from bitdance_jax.plan import hlo
from bitdance_jax.sampling import next_patch
from bitdance_jax.sampling.next_patch import resolve


ERRORS = [("int8", 0.005, 0.011), ("fp8", 0.024, 0.029), ("int4", 0.09, 0.105)]
"""Of products: bounds of `relative_error`."""


def relative_error(actual, desired) -> float:
    """Root mean square of the difference over that of the desired values."""
    actual = np.asarray(actual, np.float32)
    desired = np.asarray(desired, np.float32)
    return float(np.sqrt(np.mean((actual - desired) ** 2) / np.mean(desired**2)))


def test_values_are_the_nearest_of_255_steps():
    kernel = jnp.array([[1.0, -0.5, 0.0], [-0.31, 0.25, 0.0], [0.004, 0.1, 0.0]])
    quantized = quantize.quantize(kernel, FORMATS["int8"])
    assert quantized.values.dtype == jnp.int8 and quantized.scale.shape == (1, 3)
    np.testing.assert_array_equal(quantized.values, [[127, -127, 0], [-39, 64, 0], [1, 25, 0]])
    np.testing.assert_allclose(quantized.scale[0, :2], [1 / 127, 0.5 / 127], rtol=1e-6)
    assert np.all(np.abs(quantized.values * quantized.scale - kernel) <= quantized.scale / 2 + 1e-9)


def test_int4_groups():
    """The largest weight of a group becomes -8, or its clipping costs less than it saves."""
    kernel = jnp.zeros((256, 2)).at[3, 0].set(2.0).at[200, 1].set(-4.0)
    quantized = quantize.quantize(kernel, FORMATS["int4"])
    assert quantized.values.dtype == jnp.int4 and quantized.scale.shape == (2, 2)
    np.testing.assert_array_equal(quantized.dequantized(jnp.float32), kernel)
    assert quantized.values[3, 0] == quantized.values[200, 1] == -8
    # One weight of 1 among 127 of 0.3: 8 steps of 1/8 are 0.25 or 0.375; smaller steps are better.
    kernel = jnp.full((128, 1), 0.3).at[0].set(1.0)
    quantized = quantize.quantize(kernel, FORMATS["int4"])
    assert np.max(np.abs(quantized.dequantized(jnp.float32)[1:] - 0.3)) < 0.02


def test_int4_takes_half_a_byte():
    """Two values share a byte in compiled programs, though numpy's itemsize is one byte."""
    values = jax.ShapeDtypeStruct((256, 8), jnp.int4)
    read = jax.jit(lambda values: values.astype(jnp.float32)).lower(values).compile()
    assert read.memory_analysis().argument_size_in_bytes == 1024 == quantize.num_bytes(values)


def test_embedding():
    """Rows of an embedding have their own scales."""
    table = jax.random.normal(jax.random.key(0), (9, 256)).at[4].set(0)
    quantized = quantize.quantize(table, FORMATS["int4"], axis=1)
    assert quantized.scale.shape == (9, 2)
    layer = linear.Embed(9, 256)
    rows = layer.apply({"params": {"embedding": quantized}}, jnp.array([[4, 0, 8]]))
    np.testing.assert_array_equal(rows[0], quantized.dequantized(jnp.float32)[jnp.array([4, 0, 8])])
    assert relative_error(quantized.dequantized(jnp.float32), table) < 0.11


@pytest.mark.parametrize("how", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    "layer",
    [linear.Dense(7, dtype=jnp.float32), FusedDense(3, 5, use_bias=True)],
    ids=["dense", "fused"],
)
def test_layers_read_them(layer, how):
    """Layers with a quantized kernel compute as with its values, bias included."""
    x = jax.random.normal(jax.random.key(0), (2, 4, 6))
    params = layer.init(jax.random.key(1), x)["params"] | {
        "bias": jnp.ones((7,) if layer.features == 7 else (3, 5))
    }
    quantized = quantize.quantize(params["kernel"], how)
    dequantized = quantized.dequantized(jnp.float32)
    assert 0 < relative_error(dequantized, params["kernel"]) < 0.15
    expected = layer.apply({"params": params | {"kernel": dequantized}}, x)
    ours = layer.apply({"params": params | {"kernel": quantized}}, x)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("weights", "low", "high"), ERRORS)
def test_error_at_the_released_width(weights, low, high):
    """127 steps are about 3.9 standard deviations of 5120 normal weights; the error is 0.9 %."""
    x = jax.random.normal(jax.random.key(0), (4, 5120))
    kernel = jax.random.normal(jax.random.key(1), (5120, 512)) / 5120**0.5
    layer = linear.Dense(512, use_bias=False, dtype=jnp.float32)
    read = jax.jit(lambda kernel, x: layer.apply({"params": {"kernel": kernel}}, x))
    quantized = jax.jit(functools.partial(quantize.quantize, how=FORMATS[weights]))(kernel)
    assert low < relative_error(read(quantized, x), read(kernel, x)) < high


def quantized_params(params: dict, weights: str) -> dict:
    flat = traverse_util.flatten_dict(params, sep="/")

    def store(name, array):
        how = quantize.chosen(name, weights)
        if how is None:
            return jnp.asarray(array)
        return quantize.quantize(jnp.asarray(array), how, quantize.input_axis(name))

    small = {name: store(name, array) for name, array in flat.items()}
    assert sum(isinstance(a, Quantized) for a in small.values()) > 10
    return traverse_util.unflatten_dict(small, sep="/")


@pytest.mark.parametrize(
    ("weights", "largest_error", "least_equal"),
    [("int8", 0.02, 0.97), ("fp8", 0.05, 0.96), ("int4", 0.18, 0.87)],
)
def test_error_of_the_recorded_model(weights, largest_error, least_equal):
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

    state = run(quantized_params(params, weights))
    expected = np.stack([recorded[f"step{i}.cond"] for i in steps])
    equal = np.mean((np.asarray(state.values) > 0) == (np.asarray(bits) > 0))
    error = relative_error(state.cache[1], expected)
    assert 1e-4 < error < largest_error
    assert equal > least_equal


@pytest.mark.parametrize(
    ("weights", "dtype"), [("int8", "s8"), ("fp8", "f8e4m3fn"), ("int4", "s4")]
)
def test_a_loop_converts_kernels_where_it_reads_them(weights, dtype):
    """Not before the loop, or the weights of all layers would exist in the compute type at once."""
    layer = linear.Dense(512, use_bias=False, dtype=jnp.float32)
    kernels = [
        quantize.abstract(
            jax.ShapeDtypeStruct((512, 512), jnp.float32), FORMATS[weights], "text/q/kernel"
        )
    ] * 3

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
        dtype
    ] * 3
