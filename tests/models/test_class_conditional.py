"""Training against the golden cases. The sampler's are in tests/sampling."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import compiling
import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
import tiny_models
from einops import rearrange
from flax.traverse_util import flatten_dict
from golden_models import CLASS_CONDITIONAL, assert_close, nhwc
from streams import Dtypes, dtypes

from bitdance_jax.config import ClassConditionalConfig
from bitdance_jax.convert import keys
from bitdance_jax.heads import dit, flow_matching
from bitdance_jax.heads.flow_matching import FlowNoise
from bitdance_jax.models import class_conditional
from bitdance_jax.models.class_conditional import ClassConditional, TrainingNoise
from bitdance_jax.nn import attention
from bitdance_jax.nn.stack import stack, unstack
from bitdance_jax.pipelines.programs import read_labels
from bitdance_jax.pipelines.weights import sampling_params
from bitdance_jax.sampling import next_patch
from bitdance_jax.sampling.compiled import Inputs
from bitdance_jax.sampling.next_patch import noise_of_images, resolve
from bitdance_jax.transformer import order


class Results(NamedTuple):
    """What one training step computes; `gradient` unrolled and flat, by path."""

    loss: jax.Array
    hidden: jax.Array
    gradient: dict[tuple[str, ...], jax.Array]


class Case(NamedTuple):
    """A golden case: recorded, as in training (scanned, remat), and unrolled: exact, perturbed."""

    recorded: Results
    ours: Results
    exact: Results
    others: list[Results]


def training_step(
    name: str, recorded: dict[str, np.ndarray], scan: bool
) -> Callable[[Any], Results]:
    config, _, _ = golden_models.class_conditional(name)
    model = ClassConditional(config, scan=scan, remat="dots" if scan else None)
    # The release repeats complete batches one after the other.
    noisy = recorded["noise"].reshape(-1, config.tokens_per_step, config.tokenizer.bits)
    times = image_by_image(recorded["t_normal"].reshape(-1), config)
    uniform = (jnp.asarray(recorded[key]) for key in ("flip_u1", "flip_u2", "label_drop_u"))
    noise = TrainingNoise(*uniform, FlowNoise(times, image_by_image(noisy, config)))
    labels = jnp.asarray(recorded["label"], jnp.int32)
    codes = nhwc(recorded["codes"])

    def step(params):
        def loss(params):
            return class_conditional.class_conditional_loss(model, params, labels, codes, noise)

        # The transformer's input, computed independently of the loss.
        flipped = noise.flip_u1 < config.bit_flip_rate * noise.flip_u2
        bits = order.grid_to_sequence(codes, config.patch_side, config.order) * jnp.where(
            flipped, -1, 1
        )
        kept = jnp.where(noise.label_drop < config.label_drop_rate, config.num_classes, labels)
        hidden = model.apply({"params": params}, kept, bits.astype(jnp.float32), method="hidden")
        value, gradient = jax.value_and_grad(loss)(params)
        return Results(value, hidden, gradient)

    return step


def image_by_image(array: np.ndarray, config: ClassConditionalConfig) -> jax.Array:
    """Recorded values of all images' patches, repeat after repeat, as [B, M, N, ...]."""
    return rearrange(
        jnp.asarray(array), "(r b n) ... -> b r n ...", r=config.head_repeats, n=config.num_steps
    )


@pytest.fixture(
    scope="module",
    params=[
        name if name == "imagenet_16x" else pytest.param(name, marks=pytest.mark.slow(4))
        for name in CLASS_CONDITIONAL
    ],
)
def case(request) -> Case:
    name = request.param
    config, params, table = golden_models.class_conditional(name)
    recorded = golden_models.read(f"{name}/train")
    gradients = {
        key.removeprefix("grad."): value
        for key, value in recorded.items()
        if key.startswith("grad.")
    }
    times = (
        recorded["t"]
        if "t" in recorded
        else flow_matching.training_times(jnp.asarray(recorded["t_normal"]), config.head).reshape(
            -1
        )
    )
    times = image_by_image(times, config)
    with pytest.MonkeyPatch.context() as patch:
        # Both have other tests, and their rounding changes gradients more than all else does.
        patch.setattr(flow_matching, "training_times", lambda *_: times)
        patch.setattr(dit, "timestep_features", rounding.recorded_time_features)
        unrolled = training_step(name, recorded, scan=False)
        with compiling.optimized(name == "imagenet_4x"):
            ours = jax.device_get(jax.jit(training_step(name, recorded, scan=True))(stack(params)))
        exact = rounding.in_float64(unrolled)(params)
        others = rounding.other_runs(unrolled, params)
    return Case(
        Results(recorded["loss"], recorded["hidden"], flatten_dict(keys.convert(gradients, table))),
        ours._replace(gradient=flatten_dict(unstack(ours.gradient))),
        exact._replace(gradient=flatten_dict(exact.gradient)),
        [x._replace(gradient=flatten_dict(x.gradient)) for x in others],
    )


@pytest.mark.parametrize("field", ["loss", "hidden"])
def test_results(case, field):
    exact = getattr(case.exact, field)
    others = [getattr(other, field) for other in case.others]
    assert rounding.bound(exact, others) < 1e-3
    for results in (case.ours, case.recorded):
        rounding.assert_rounded(np.reshape(getattr(results, field), exact.shape), exact, others)


def test_gradients(case):
    """At these random weights float32 gradients, the release's too, differ by up to 1e-2 in 16x."""
    assert len(case.recorded.gradient) >= 4
    for path, exact in case.exact.gradient.items():
        others = [other.gradient[path] for other in case.others]
        assert rounding.bound(exact, others) < 1, path
        for results in (case.ours, case.recorded):
            if path in results.gradient:
                rounding.assert_rounded(results.gradient[path], exact, others, "/".join(path))


@pytest.mark.parametrize("name", ["imagenet_1x", "imagenet_4x"])
def test_padding_for_cudnn_changes_nothing(name, monkeypatch):
    """The fused kernel gets even lengths; replaced by XLA's here, which runs without a GPU."""
    lengths = []

    def attend_by_cudnn(q, k, v, mask):
        lengths.append(q.shape[2])
        return attention.attend(q, k, v, mask, "xla")

    monkeypatch.setattr(attention, "_attend_by_cudnn", attend_by_cudnn)
    config, params, _ = golden_models.class_conditional(name)
    labels, bits, *_ = toy_arguments(config, batch=2)
    hidden = [
        jax.jit(functools.partial(ClassConditional(config, kernel=kernel).apply, method="hidden"))(
            {"params": params}, labels, bits
        )
        for kernel in ("cudnn", "xla")
    ]
    assert lengths and all(length % 2 == 0 for length in lengths)
    assert_close(hidden[0], hidden[1], 1e-6)


def test_sampling_by_cudnn_changes_nothing(monkeypatch):
    """The fused kernel gets the cache, of even length, and its filled positions; XLA's here."""
    lengths = []

    def attend_by_cudnn(q, k, v, mask, filled):
        lengths.append(k.shape[2])
        return attention.attend(q, k, v, mask & (jnp.arange(k.shape[2]) < filled), "xla")

    monkeypatch.setattr(attention, "_attend_by_cudnn", attend_by_cudnn)
    params = unstack(tiny_models.model_params())
    samples = [
        jax.jit(functools.partial(sample_of, ClassConditional(tiny_models.MODEL, kernel=kernel)))(
            params
        )
        for kernel in ("cudnn", "xla")
    ]
    assert lengths and all(length % 2 == 0 for length in lengths)
    np.testing.assert_array_equal(*map(np.sign, samples))
    assert_close(*samples, 1e-5)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("b_1x", 242.4), ("b_4x", 260.1), ("b_16x", 260.1), ("l_1x", 527.3), ("h_1x", 1008.0)],
)
def test_released_sizes(name, millions):
    """The released models, without their tokenizer."""
    config = ClassConditionalConfig.imagenet(name)
    arguments = toy_arguments(config, batch=1)
    params = jax.eval_shape(
        lambda: ClassConditional(config, scan=True).init(jax.random.key(0), *arguments)
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert round(count / 1e6, 1) == millions


def toy_arguments(config: ClassConditionalConfig, batch: int) -> tuple[jax.Array, ...]:
    bits = jnp.ones((batch, config.num_tokens, config.tokenizer.bits))
    patches = class_conditional.to_patches(bits, config)
    times = jnp.zeros((batch, 1, config.num_steps))
    return jnp.zeros(batch, jnp.int32), bits, patches, FlowNoise(times, patches[:, None])


def loss_of(model: ClassConditional, params: Any) -> jax.Array:
    noise = class_conditional.training_noise(jax.random.split(jax.random.key(0), 2), model.config)
    codes = jnp.ones((2, model.config.grid, model.config.grid, model.config.tokenizer.bits))
    return class_conditional.class_conditional_loss(
        model, params, jnp.zeros(2, jnp.int32), codes, noise
    )


def sample_of(model: ClassConditional, params: Any) -> jax.Array:
    """With guidance: the prefix, then patch by patch through the cache."""
    keys = jax.random.split(jax.random.key(0), 2)
    config = tiny_models.MODEL
    solver, scales = resolve(tiny_models.SAMPLER, config.head.time_shift, config.num_steps)
    reader = read_labels(model, params, Inputs(jnp.zeros(2, jnp.int32)), scales)
    noise = noise_of_images(reader, keys, solver)
    return next_patch.sample(reader, noise=noise, solver=solver, scales=scales)


@pytest.mark.parametrize(("residual", "stream"), [("float32", "float32"), ("compute", "bfloat16")])
def test_only_products_run_in_the_compute_type(residual, stream):
    """In training, and in sampling with a cache from weights in bfloat16."""
    config = tiny_models.MODEL
    config = dataclasses.replace(
        config, transformer=dataclasses.replace(config.transformer, residual_dtype=residual)
    )
    params = class_conditional.abstract_params(config)
    training = ClassConditional(config, scan=True, remat="dots", dtype=jnp.bfloat16)
    gradient = jax.value_and_grad(functools.partial(loss_of, training))
    assert dtypes(gradient, params) == Dtypes({stream}, {stream}, {"bfloat16"})
    kept = jax.eval_shape(functools.partial(sampling_params, dtype=jnp.bfloat16), params)
    sample = functools.partial(sample_of, ClassConditional(config, dtype=jnp.bfloat16))
    assert dtypes(sample, kept) == Dtypes({stream}, {stream}, {"bfloat16"})


def test_training_noise():
    """Shapes, distributions, and that they depend on the key."""
    config = golden_models.class_conditional("imagenet_4x").config
    noise = class_conditional.training_noise(jax.random.split(jax.random.key(0), 3), config)
    repeats = config.head_repeats
    noise = [*noise[:3], *noise.head]
    assert [x.shape for x in noise] == [
        (3, 64, 8),
        (3, 64, 8),
        (3,),
        (3, repeats, 16),
        (3, repeats, 16, 4, 8),
    ]
    for uniform in noise[:2]:
        assert 0 <= uniform.min() < 0.05
        assert 0.95 < uniform.max() < 1
        assert abs(uniform.mean() - 0.5) < 0.05
    assert abs(noise[-1].mean()) < 0.1
    assert abs(noise[-1].std() - 1) < 0.1
    others = class_conditional.training_noise(jax.random.split(jax.random.key(1), 3), config)
    others = [*others[:3], *others.head]
    assert all(not np.any(a == b) for a, b in zip(noise, others, strict=True))
    assert all(not np.any(x[0] == x[1]) for x in noise)


def test_targets_are_clean_and_inputs_flipped():
    """With rate 1 and u1 = 0 the transformer reads negated bits, and the targets are the bits."""
    config, params, _ = golden_models.class_conditional("imagenet_16x")
    config = dataclasses.replace(config, bit_flip_rate=1.0, label_drop_rate=1.0)
    model = ClassConditional(config)
    noise = class_conditional.training_noise(jax.random.split(jax.random.key(0), 2), config)
    noise = noise._replace(
        flip_u1=jnp.zeros_like(noise.flip_u1), flip_u2=jnp.ones_like(noise.flip_u2)
    )
    codes = jnp.sign(jax.random.normal(jax.random.key(1), (2, 8, 8, 8)))

    @jax.jit
    def both(params):
        loss = class_conditional.class_conditional_loss(
            model, params, jnp.array([1, 2]), codes, noise
        )
        target = order.grid_to_sequence(codes, config.patch_side, config.order)
        clean = class_conditional.to_patches(target, config)[:, None]
        t = jax.nn.sigmoid(0.8 * noise.head.time - 0.8)
        x_t = t[..., None, None] * clean + (1 - t[..., None, None]) * noise.head.bits
        unconditional = jnp.full(2, config.num_classes)
        bound = model.bind({"params": params})
        predicted = bound.head.predict_all(x_t, t, bound.states(unconditional, -target))
        return loss, jnp.mean(
            ((clean - predicted) / jnp.maximum(1 - t, 0.05)[..., None, None]) ** 2
        )

    loss, expected = both(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
