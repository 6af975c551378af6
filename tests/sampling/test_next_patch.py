import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import compiling
import golden_models
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
import rounding
from einops import rearrange
from golden_models import CLASS_CONDITIONAL, assert_close, nhwc
from random_params import random_params

from bitdance_jax.config import (
    ClassConditionalConfig,
    FlowHeadConfig,
    SamplerConfig,
    TokenizerConfig,
    TransformerConfig,
)
from bitdance_jax.distributed.mesh import make_mesh
from bitdance_jax.heads import binary_diffusion, dit
from bitdance_jax.heads.flow_matching import FlowNoise
from bitdance_jax.models.class_conditional import ClassConditional, to_patches
from bitdance_jax.pipelines.programs import read_labels
from bitdance_jax.sampling import next_patch
from bitdance_jax.sampling.compiled import CompiledSampler, Inputs
from bitdance_jax.sampling.guidance import rows_of_image
from bitdance_jax.sampling.next_patch import noise_from_keys, resolve
from bitdance_jax.sampling.solvers import make_solver
from bitdance_jax.tokenizer import lfq
from bitdance_jax.transformer import order


RECORDED = {
    "nocfg": SamplerConfig(head_steps=4),
    "cfg": SamplerConfig(head_steps=4, guidance_scale=3.0, guidance_schedule="linear"),
}
QUICK = {("imagenet_4x", "nocfg"), ("imagenet_16x", "cfg")}

TOY = ClassConditionalConfig(
    tokenizer=TokenizerConfig(bits=6, ch=32, ch_mult=(1, 1), num_res_blocks=1, num_codebooks=2),
    transformer=TransformerConfig(num_layers=2, dim=32, num_heads=2),
    head=FlowHeadConfig(width=24, num_blocks=2, num_groups=1, head_dim=12),
    num_classes=5,
    image_size=8,
    tokens_per_step=4,
    class_tokens=3,
)
"""4 patches of 4 tokens; no two kernels that the tests count have the same shape."""


@functools.cache
def toy_params(config: ClassConditionalConfig) -> dict:
    bits = jnp.ones((1, config.num_tokens, config.tokenizer.bits))
    patches = to_patches(bits, config)
    noise = FlowNoise(jnp.zeros((1, 1, config.num_steps)), patches[:, None])
    return random_params(ClassConditional(config), jnp.zeros(1, jnp.int32), bits, patches, noise)


def recorded_noise(recorded: dict[str, np.ndarray], config: ClassConditionalConfig) -> Callable:
    """Recorded noise: for all rows in the first patch, for the images alone in the others."""

    def patch_noise(patch: int) -> np.ndarray:
        start, steps = (
            recorded[f"step{patch}.init_noise"][None],
            recorded[f"step{patch}.step_noise"],
        )
        noise = np.concatenate([start, steps])
        return noise.reshape(*noise.shape[:2], config.tokens_per_step, config.tokenizer.bits)

    noises = [patch_noise(patch) for patch in range(config.num_steps)]
    rows = noises[0].shape[1]
    stacked = jnp.asarray(np.stack([np.tile(x, (1, rows // x.shape[1], 1, 1)) for x in noises]))
    return lambda patch, separate: stacked[patch]


class Golden(NamedTuple):
    """A recorded case [N, B, P, K]; exact and float32 values of patches after the recorded ones.

    `run` is what users run: the compiled sampler, with the recorded noise in the place of its own.
    """

    run: Callable[[], np.ndarray]
    recorded: np.ndarray
    exact: np.ndarray
    others: list[np.ndarray]
    others_on_cpu: list[np.ndarray]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((name, kind), marks=() if (name, kind) in QUICK else pytest.mark.slow(4))
        for name in CLASS_CONDITIONAL
        for kind in RECORDED
    ],
    ids="/".join,
)
def golden(request) -> Golden:
    name, kind = request.param
    config, params, _ = golden_models.class_conditional(name)
    recorded, sampler = golden_models.read(f"{name}/sample_{kind}"), RECORDED[kind]
    labels, noise = jnp.asarray(recorded["label"], jnp.int32), recorded_noise(recorded, config)
    values = [
        recorded[f"step{i}.pre_sign"].reshape(-1, config.tokens_per_step, config.tokenizer.bits)
        for i in range(config.num_steps)
    ]
    rows = len(labels) * rows_of_image(sampler)
    # With guidance the first patch has as many rows, all later ones are shared.
    bits = jnp.stack([jnp.sign(np.tile(x, (rows // len(x), 1, 1))) for x in values])

    solver, scales = resolve(sampler, config.head.time_shift, config.num_steps)

    read = functools.partial(read_labels, ClassConditional(config))

    def replayed(params):
        model = rounding.Replayed(read(params, Inputs(labels), scales), bits)
        return next_patch.sample(model, noise=noise, solver=solver, scales=scales)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dit, "timestep_features", rounding.recorded_time_features)
        exact, others = rounding.in_float64(replayed)(params), rounding.other_runs(replayed, params)
        others_on_cpu = rounding.runs_of_recordings(replayed, params, others)

    def compiled_run():
        # One case is compiled as for users, by a new sampler: JAX would reuse earlier traces.
        sampler = CompiledSampler(read, make_mesh(devices=jax.devices()[:1]))
        options = {"solver": solver, "scales": scales, "num_patches": config.num_steps}
        keys = np.zeros((len(labels), 2), np.uint32)
        with compiling.optimized(request.param == ("imagenet_4x", "cfg")):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(next_patch, "noise_of_images", lambda *_: noise)
                return np.asarray(sampler.sample(params, Inputs(labels), keys, **options))

    images = np.stack([x[: len(labels)] for x in values])
    return Golden(compiled_run, images, exact, others, others_on_cpu)


def test_recorded_values(golden):
    """Patch by patch within float32's rounding on CPUs, which may decide a bit at these weights."""
    for i, recorded in enumerate(golden.recorded):
        others = [other[i] for other in golden.others_on_cpu]
        rounding.assert_rounded(recorded, golden.exact[i], others, f"patch {i}")


@pytest.mark.parametrize("name", CLASS_CONDITIONAL)
def test_golden_order(name):
    config, recorded = (
        golden_models.class_conditional(name).config,
        golden_models.read(f"{name}/sample_nocfg"),
    )
    bits = np.stack([np.sign(recorded[f"step{i}.pre_sign"]) for i in range(config.num_steps)])
    tokens = rearrange(
        bits.reshape(config.num_steps, -1, config.tokens_per_step, config.tokenizer.bits),
        "n b p k -> b (n p) k",
    )
    grid = order.sequence_to_grid(jnp.asarray(tokens), config.grid, config.patch_side, config.order)
    np.testing.assert_array_equal(grid, nhwc(recorded["codes"]))


@pytest.mark.parametrize("at_once", [False, True])
def test_golden_samples(golden, at_once, monkeypatch):
    """Our own samples, with the modulation computed for each evaluation or for all at once."""
    monkeypatch.setattr(dit, "timestep_features", rounding.recorded_time_features)
    monkeypatch.setattr(binary_diffusion, "modulated_at_once", lambda *_: at_once)
    values = golden.run()
    rounding.assert_rounded(values[0], golden.exact[0], [other[0] for other in golden.others])
    rounding.assert_bits(values, golden.recorded, golden.exact, golden.others)


class Sampler(NamedTuple):
    """The toy model with guidance, from labels and seeds to bits; traced label shapes."""

    sample: Callable
    traces: list


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    params = toy_params(TOY)
    config = SamplerConfig(head_steps=3, guidance_scale=2.0)
    solver, scales = resolve(config, TOY.head.time_shift, TOY.num_steps)
    options = {"solver": solver, "scales": scales, "num_patches": TOY.num_steps}
    traces = []

    def read(params, inputs, scales):
        traces.append(inputs.images.shape)
        return read_labels(ClassConditional(TOY), params, inputs, scales)

    compiled = CompiledSampler(read, make_mesh(devices=jax.devices()[:1]))

    def sample(labels, seeds):
        keys = np.stack([jax.random.key_data(jax.random.key(seed)) for seed in seeds])
        values = compiled.sample(params, Inputs(np.array(labels, np.int32)), keys, **options)
        return np.where(np.asarray(values) > 0, 1, -1).swapaxes(0, 1)

    return Sampler(sample, traces)


@compiling.optimized()
def test_an_image_is_the_same_in_any_batch(sampler):
    labels, seeds = [4, 0, 2], [7, 8, 9]
    together = sampler.sample(labels, seeds)
    assert together.shape == (3, 4, 4, 6)  # 4 patches of 4 tokens
    assert set(np.unique(together)) == {-1.0, 1.0}
    for i in range(3):
        np.testing.assert_array_equal(
            sampler.sample(labels[i : i + 1], seeds[i : i + 1])[0], together[i]
        )
    np.testing.assert_array_equal(sampler.sample(labels[::-1], seeds[::-1]), together[::-1])


def test_seeds_and_labels_matter(sampler):
    base = sampler.sample([1, 1, 1], [0, 1, 2])
    assert all(np.mean(base[i] != base[i - 1]) > 0.2 for i in range(3))
    relabelled = sampler.sample([1, 3, 1], [0, 1, 2])
    np.testing.assert_array_equal(relabelled[[0, 2]], base[[0, 2]])
    assert np.any(relabelled[1] != base[1])


def test_one_program_for_each_shape(sampler):
    sampler.sample([0, 1, 2], [0, 1, 2])
    sampler.sample([2, 2, 2], [5, 4, 3])
    sampler.sample([3], [1])
    # One for the prefix, one for the patches.
    assert sorted(sampler.traces) == sorted(2 * list(set(sampler.traces)))


def test_noise_from_keys():
    """Normal, and different for every image, patch, and for the unconditional rows."""
    keys = jax.random.split(jax.random.key(0), 2)
    source = noise_from_keys(keys, num_noises=5, tokens=4, bits=6)
    own, shared, apart = source(0, None), source(0, jnp.bool(False)), source(0, jnp.bool(True))
    assert own.shape == (5, 2, 4, 6)
    assert apart.shape == (5, 4, 4, 6)
    np.testing.assert_array_equal(apart[:, :2], own)
    np.testing.assert_array_equal(shared, np.tile(own, (1, 2, 1, 1)))
    np.testing.assert_array_equal(source(jnp.int32(0), None), own)
    values = np.concatenate([np.ravel(apart), np.ravel(source(1, jnp.bool(True)))])
    assert len(np.unique(values)) == len(values)
    assert abs(values.mean()) < 0.1
    assert abs(values.std() - 1) < 0.1
    np.testing.assert_array_equal(
        noise_from_keys(keys[1:], 5, 4, 6)(0, jnp.bool(True)), apart[:, 1::2]
    )


@pytest.mark.parametrize(
    "guidance",
    [
        SamplerConfig(),
        *RECORDED.values(),
        SamplerConfig(guidance_scale=2.5, guidance_schedule="constant"),
    ],
    ids=["default", *RECORDED, "constant"],
)
@pytest.mark.parametrize(
    ("solver", "evaluations"),
    [("euler_maruyama", 8), ("euler", 7), ("heun", 13), ("multistep_sde", 7)],
)
@pytest.mark.parametrize("at_once", [False, True])
def test_how_often_everything_runs(solver, evaluations, guidance, at_once, monkeypatch):
    """N = 7: calls of the head, of the time embedding, of the condition and of the modulation."""
    monkeypatch.setattr(binary_diffusion, "modulated_at_once", lambda *_: at_once)
    config = dataclasses.replace(guidance, head_steps=7, solver=solver)
    params = jax.tree.map(jnp.zeros_like, toy_params(TOY))
    solver, scales = resolve(config, TOY.head.time_shift, TOY.num_steps)
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), 2))
    read = functools.partial(read_labels, ClassConditional(TOY))
    compiled = CompiledSampler(read, make_mesh(devices=jax.devices()[:1]))
    sample = functools.partial(compiled.traceable, solver=solver)
    program = jax.make_jaxpr(sample)(params, Inputs(jnp.array([0, 1])), keys, scales)

    weights, patches = params["head"], TOY.num_steps
    assert (
        sum(jaxprs.products_with(program, weights["final_linear"]["kernel"].shape))
        == evaluations * patches
    )
    assert sum(
        jaxprs.products_with(program, weights["groups_0"]["ada_ln"]["kernel"].shape)
    ) == patches * (1 if at_once else evaluations)
    assert jaxprs.products_with(program, weights["time_embed"]["fc1"]["kernel"].shape) == [1]
    assert sum(jaxprs.products_with(program, weights["cond_embed"]["kernel"].shape)) == patches
    assert (
        len(jaxprs.products_with(program, weights["final_linear"]["kernel"].shape)) == 1
    )  # it is compiled once
    # The transformer reads the prefix, then the first block and every patch but the last.
    reads = TOY.transformer.num_layers * (1 + patches)
    assert (
        sum(
            jaxprs.products_with(
                program, params["transformer"]["layers_0"]["attention"]["qkv"]["kernel"].shape
            )
        )
        == reads
    )


@pytest.mark.parametrize(
    ("tokens_per_step", "mask", "kind", "class_tokens"),
    [
        (1, "block_causal", "patch", 3),
        (4, "block_causal", "patch", 1),
        (4, "block_causal", "token", 3),
        (4, "causal", "token", 3),
    ],
)
def test_sampling_reads_as_training_does(tokens_per_step, mask, kind, class_tokens):
    """One Euler step gives the head's prediction at t = 0, as teacher forcing on the bits does."""
    config = dataclasses.replace(
        TOY, tokens_per_step=tokens_per_step, mask=mask, order=kind, class_tokens=class_tokens
    )
    model, params, labels = ClassConditional(config), toy_params(config), jnp.array([1, 3])
    sampler = SamplerConfig(head_steps=1, solver="euler")
    solver = make_solver(sampler, config.head.time_shift)
    keys = jax.random.split(jax.random.key(0), 2)
    source = noise_from_keys(keys, solver.num_noises, tokens_per_step, TOY.tokenizer.bits)

    @jax.jit
    def both(params):
        reader = read_labels(model, params, Inputs(labels), None)
        values = next_patch.sample(reader, noise=source, solver=solver, scales=None)
        bits = rearrange(lfq.quantize(values), "n b p k -> b (n p) k")
        noise = jax.vmap(lambda patch: source(patch, None)[0])(jnp.arange(config.num_steps))
        x_t = rearrange(noise, "n b p k -> b 1 n p k")
        bound = model.bind({"params": params})
        predicted = bound.head.predict_all(
            x_t, jnp.zeros(x_t.shape[:3]), bound.states(labels, bits)
        )
        return values, predicted

    values, predicted = both(params)
    assert_close(values, rearrange(predicted, "b 1 n p k -> n b p k"), 1e-5)
