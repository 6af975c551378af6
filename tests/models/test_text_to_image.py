import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import compiling
import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from einops import rearrange
from golden_models import TEXT_TO_IMAGE, assert_close, largest_error, nhwc
from random_params import random_params
from streams import Dtypes, dtypes

from bitdance_jax.config import (
    ConfigError,
    FlowHeadConfig,
    ImageTokens,
    Qwen3Config,
    SamplerConfig,
    TextToImageConfig,
    TokenizerConfig,
    from_dict,
    to_dict,
)
from bitdance_jax.distributed.mesh import make_mesh
from bitdance_jax.errors import UserError
from bitdance_jax.heads import dit
from bitdance_jax.heads.flow_matching import FlowNoise
from bitdance_jax.models import text_to_image
from bitdance_jax.models.prompt_rows import prefix_rows
from bitdance_jax.models.text_to_image import (
    PatchReader,
    Prefixes,
    TextToImage,
    token_positions,
)
from bitdance_jax.nn import rope
from bitdance_jax.pipelines.programs import read_prompts
from bitdance_jax.sampling import next_patch
from bitdance_jax.sampling.compiled import CompiledSampler, Inputs
from bitdance_jax.sampling.next_patch import noise_from_keys, resolve
from bitdance_jax.sampling.solvers import make_solver
from bitdance_jax.transformer import order


TOY = TextToImageConfig(
    tokenizer=TokenizerConfig(bits=6, ch=32, ch_mult=(1, 1), num_res_blocks=1, num_codebooks=2),
    text=Qwen3Config(
        num_layers=2, dim=32, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=48, vocab_size=40
    ),
    head=FlowHeadConfig(width=24, num_blocks=2, num_groups=1, head_dim=12, squash_output=True),
    image_tokens=ImageTokens(
        vision_start=20, first_resolution=21, num_resolutions=16, first_query=37
    ),
    tokens_per_step=4,
)
"""Ids 0 ... 19 are text. Sides are multiples of 4 pixels up to 32; 8 x 8 are 4 patches."""

GUIDED = SamplerConfig(head_steps=1, guidance_scale=2.5, guidance_schedule="constant")
PROMPTS = ([1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11], [12])
UNCONDITIONAL = [13, 14]


class Replayed(NamedTuple):
    """A sampler with recorded noise and bits: states [N, R, P, C] and values before the sign."""

    conditions: np.ndarray
    values: np.ndarray


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("t2i_4x", "cfg"),
        pytest.param("t2i_4x", "nocfg", marks=pytest.mark.slow(8)),
        pytest.param("t2i_16x", "cfg", marks=pytest.mark.slow(8)),
        pytest.param("t2i_16x", "nocfg", marks=pytest.mark.slow(8)),
    ],
)
def test_golden_samples(name, kind, monkeypatch):
    """All states and values with the recorded bits as input, and all bits with our own."""
    config, params, prompt = golden_models.text_to_image(name)
    recorded = golden_models.read(f"{name}/sample_{kind}")
    guidance = float(recorded["guidance"])
    images = prompt["num_images"]
    sampler = SamplerConfig(
        head_steps=prompt["num_sampling_steps"],
        guidance_scale=guidance,
        guidance_schedule="constant",
    )
    rows = [prompt["cond_ids"]] * images + (
        [prompt["uncond_ids"]] * images if kind == "cfg" else []
    )
    prefixes = prefix_rows(config, rows, prompt["height"], prompt["width"])
    xy = jnp.asarray(token_positions(config, prompt["height"], prompt["width"]))
    steps = range(len(xy) // config.tokens_per_step)
    noise = jnp.stack(
        [
            jnp.concatenate(
                [recorded[f"step{i}.init_noise"][None], recorded[f"step{i}.step_noise"]]
            )
            for i in steps
        ]
    )
    bits = jnp.stack([jnp.sign(recorded[f"step{i}.pre_sign"]) for i in steps])
    noise = jnp.tile(noise, (1, 1, len(rows) // noise.shape[2], 1, 1))
    solver, scales = resolve(sampler, config.head.time_shift, len(steps))

    def run(params, stop=len(steps)) -> Replayed:
        reader = PatchReader(TextToImage(config), params, prefixes, xy)
        replayed = rounding.Replayed(reader, bits)
        state = next_patch.begin(replayed, scales)
        options = {"noise": lambda patch, _: noise[patch], "solver": solver, "scales": scales}
        state = next_patch.advance(replayed, state, stop, **options)
        return Replayed(state.cache[1], state.values)

    frequencies = rope.frequencies_1d
    rounded = lambda *sizes: frequencies(*sizes).astype(jnp.bfloat16).astype(np.float32)  # noqa: E731  golden/README.md
    monkeypatch.setattr(rope, "frequencies_1d", rounded)
    monkeypatch.setattr(dit, "timestep_features", rounding.recorded_time_features)
    # Ours are from the compiled sampler that users run, but with the recorded noise.
    read = functools.partial(read_prompts, TextToImage(config))
    first = slice(None, images)
    last = slice(-images, None)
    inputs = Inputs(
        tuple(jax.tree.map(lambda x, rows=rows: x[rows], prefixes) for rows in (first, last)),
        xy,
    )
    options = {"solver": solver, "scales": scales, "num_patches": len(steps)}
    arguments = params, inputs, np.zeros((images, 2), np.uint32)
    monkeypatch.setattr(next_patch, "noise_of_images", lambda *_: lambda patch, _: noise[patch])
    mesh = make_mesh(devices=jax.devices()[:1])
    replaying = CompiledSampler(lambda *given: rounding.Replayed(read(*given), bits), mesh)
    # One case is compiled as for users.
    with compiling.optimized((name, kind) == ("t2i_16x", "cfg")):
        [_, (state, _)] = replaying.states(*arguments, **options, every=len(steps))
        ours = Replayed(state.cache[1], state.values)
        sampled = np.asarray(CompiledSampler(read, mesh).sample(*arguments, **options))
    exact = rounding.in_float64(run)(params)
    others = rounding.other_runs(run, params)
    for i in steps:
        expected = recorded[f"step{i}.pre_sign"][: exact.values.shape[1]]
        assert_close(recorded[f"step{i}.cond"], exact.conditions[i])
        assert_close(ours.conditions[i], exact.conditions[i])
        for values in (ours.values[i], expected):
            rounding.assert_rounded(
                values, exact.values[i], [other.values[i] for other in others], f"patch {i}"
            )
    recorded_bits = np.asarray(bits)[:, : exact.values.shape[1]]
    for values in (np.asarray(ours.values), sampled):
        rounding.assert_bits(
            values, recorded_bits, exact.values, [other.values for other in others]
        )


@pytest.mark.parametrize("name", TEXT_TO_IMAGE)
def test_golden_order_and_positions(name):
    config, _, prompt = golden_models.text_to_image(name)
    recorded = golden_models.read(f"{name}/sample_nocfg")
    height = prompt["height"]
    width = prompt["width"]
    xy = token_positions(config, height, width)
    assert_close(
        text_to_image.sinusoidal_2d(jnp.asarray(xy), config.text.dim), recorded["pos_embed"], 1e-6
    )
    steps = len(xy) // config.tokens_per_step
    sampled = np.concatenate([np.sign(recorded[f"step{i}.pre_sign"]) for i in range(steps)], axis=1)
    codes = order.sequence_to_grid(
        jnp.asarray(sampled), height // config.tokenizer.downsampling, config.patch_side, "patch"
    )
    np.testing.assert_array_equal(codes, nhwc(recorded["codes"]))


def test_prefix_rows():
    """8 x 16 pixels are 4 x 8 tokens: <|res_4|>, <|res_8|>, 3 queries; text is padded to 64."""
    tokens, padding, _ = prefix_rows(TOY, PROMPTS, height=8, width=16)
    assert tokens.shape == (3, 64 + 4)
    np.testing.assert_array_equal(padding, 62 - np.array([3, 8, 1]))
    for row, pad, prompt in zip(tokens, padding, PROMPTS, strict=True):
        np.testing.assert_array_equal(row[pad:], [*prompt, 20, 24, 28, 37, 38, 39])
    assert [
        prefix_rows(TOY, [[1] * n], 8, 8).tokens.shape[1] for n in (62, 63, 126, 127, 1022)
    ] == [68, 132, 132, 260, 1028]


@pytest.mark.parametrize(
    ("prompts", "size", "message"),
    [
        ([[1]], (8, 10), "width and height must be multiples of 4 up to 32 pixels, got 10x8"),
        ([[1]], (0, 8), "got 8x0"),
        ([[1]], (36, 8), "got 8x36"),
        ([[1, 10**9]], (8, 8), "a prompt has the token 1000000000, and the vocabulary"),
        ([[1] * 1023], (8, 8), "a prompt has 1023 tokens with its template, and at most 1022 fit"),
    ],
)
def test_bad_input(prompts, size, message):
    with pytest.raises(UserError, match=message):
        prefix_rows(TOY, prompts, *size)


class Sampler(NamedTuple):
    """From prompts and image seeds to values before the sign [B, T, K], and the traced shapes."""

    sample: Callable[..., np.ndarray]
    traces: list[tuple]


def no_noise(images: int, patches: int) -> FlowNoise:
    """Noise of zero."""
    shape = (images, 1, patches)
    return FlowNoise(jnp.zeros(shape), jnp.zeros((*shape, TOY.tokens_per_step, TOY.tokenizer.bits)))


@pytest.fixture(scope="module")
def params() -> dict:
    xy = jnp.zeros((4, 2), jnp.int32)
    bits = jnp.zeros((1, 4, TOY.tokenizer.bits))
    return random_params(
        TextToImage(TOY), jnp.zeros((1, 4), jnp.int32), xy, bits, no_noise(images=1, patches=1)
    )


def sample_guided(
    model: TextToImage, params: dict, prefixes: Prefixes, xy: jax.Array, keys: jax.Array
) -> jax.Array:
    """Values before the sign [N, B, P, K]."""
    reader = PatchReader(model, params, prefixes, xy)
    solver, scales = resolve(GUIDED, TOY.head.time_shift, reader.num_patches)
    noise = noise_from_keys(keys, solver.num_noises, TOY.tokens_per_step, TOY.tokenizer.bits)
    return next_patch.sample(reader, noise=noise, solver=solver, scales=scales)


@pytest.fixture(scope="module")
def sampler(params) -> Sampler:
    traces = []
    without_lm_head = params | {
        "text": {name: value for name, value in params["text"].items() if name != "lm_head"}
    }

    @jax.jit
    def run(params, prefixes, xy, keys):
        traces.append((prefixes.tokens.shape, xy.shape))
        return rearrange(
            sample_guided(TextToImage(TOY), params, prefixes, xy, keys), "n b p k -> b (n p) k"
        )

    def sample(prompts, seeds, height=8, width=8, more_padding=0):
        prefixes = prefix_rows(TOY, [*prompts, *[UNCONDITIONAL] * len(prompts)], height, width)
        prefixes = Prefixes(
            np.pad(prefixes.tokens, ((0, 0), (more_padding, 0))),
            prefixes.padding + np.int32(more_padding),
        )
        keys = jax.vmap(jax.random.key)(jnp.array(seeds))
        return np.asarray(run(without_lm_head, prefixes, token_positions(TOY, height, width), keys))

    return Sampler(sample, traces)


@compiling.optimized()
def test_an_image_is_the_same_in_any_batch_and_with_any_padding(sampler):
    """Sampled with others and with the least padding, and alone with more."""
    seeds = [5, 6, 7]
    together = sampler.sample(PROMPTS, seeds)
    assert together.shape == (3, 16, 6)
    for i in range(3):
        alone = sampler.sample(PROMPTS[i : i + 1], seeds[i : i + 1], more_padding=61)
        assert_close(alone[0], together[i])
        np.testing.assert_array_equal(alone[0] > 0, together[i] > 0)


def test_prompts_seeds_and_sizes_matter(sampler):
    """The same prompt with two seeds, another prompt with the first seed; then wide and high."""
    values = sampler.sample([PROMPTS[0], PROMPTS[0], PROMPTS[1]], [5, 6, 5])
    assert np.mean((values[0] > 0) != (values[1] > 0)) > 0.2
    assert largest_error(values[2], values[0]) > 0.01
    wide, high = (
        sampler.sample(PROMPTS, [5, 6, 7], height=h, width=w) for h, w in ((4, 16), (16, 4))
    )
    assert all(largest_error(a, b) > 0.01 for a, b in zip(wide, high, strict=True))


def test_one_program_for_prompts_and_sizes(sampler):
    """Prompts of any lengths up to the padded one, and sizes with as many tokens."""
    sampler.sample(PROMPTS, [0, 1, 2])
    sampler.sample([[3] * 62, [4] * 9, [5]], [3, 4, 5])
    sampler.sample(PROMPTS, [0, 1, 2], height=4, width=16)
    assert sampler.traces.count(((6, 68), (16, 2))) == 1
    assert sorted(set(sampler.traces)) == sorted(sampler.traces)


def test_sampling_reads_as_training_does(params):
    """One Euler step gives the head's prediction at t = 0, as teacher forcing on its bits does."""
    solver = make_solver(SamplerConfig(head_steps=1, solver="euler"), TOY.head.time_shift)
    xy = jnp.asarray(token_positions(TOY, 8, 12))
    keys = jax.random.split(jax.random.key(0), 2)
    source = noise_from_keys(keys, solver.num_noises, TOY.tokens_per_step, TOY.tokenizer.bits)
    prompts = [PROMPTS[1], PROMPTS[1][::-1]]
    prefixes = prefix_rows(TOY, prompts, 8, 12)
    model = TextToImage(TOY)
    steps = len(xy) // TOY.tokens_per_step

    @jax.jit
    def both(params):
        reader = PatchReader(model, params, prefixes, xy)
        values = next_patch.sample(reader, noise=source, solver=solver, scales=None)
        codes = rearrange(jnp.sign(values), "n b p k -> b (n p) k")
        x_t = jax.vmap(lambda patch: source(patch, None)[0])(jnp.arange(steps))
        x_t = rearrange(x_t, "n b p k -> b 1 n p k")
        tokens = jnp.asarray(prefixes.tokens[:, prefixes.padding[0] :])
        bound = model.bind({"params": params})
        _, states = bound.hidden(tokens, xy, codes)
        return values, bound.head.predict_all(x_t, jnp.zeros(x_t.shape[:3]), states)

    values, predicted = both(params)
    assert_close(values, rearrange(predicted, "b 1 n p k -> n b p k"), 1e-5)


def read_whole(model: TextToImage, params: dict) -> tuple[jax.Array, jax.Array]:
    xy = jnp.asarray(token_positions(TOY, 8, 8))
    tokens = jnp.asarray(prefix_rows(TOY, PROMPTS[:1], 8, 8).tokens)
    bits = jnp.ones((1, 16, TOY.tokenizer.bits))
    return model.apply({"params": params}, tokens, xy, bits, no_noise(images=1, patches=4))


def read_through_cache(model: TextToImage, params: dict) -> jax.Array:
    prefixes = prefix_rows(TOY, [PROMPTS[0], UNCONDITIONAL], 8, 8)
    xy = jnp.asarray(token_positions(TOY, 8, 8))
    return sample_guided(model, params, prefixes, xy, jax.random.split(jax.random.key(0), 1))


@pytest.mark.parametrize(("residual", "stream"), [("float32", "float32"), ("compute", "bfloat16")])
def test_only_products_run_in_the_compute_type(params, residual, stream):
    """Tokens enter the language model in the residual stream's type, with or without a cache."""
    config = dataclasses.replace(TOY, text=dataclasses.replace(TOY.text, residual_dtype=residual))
    model = TextToImage(config, dtype=jnp.bfloat16)
    kept = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    for weights in (params, kept):
        for read in (read_whole, read_through_cache):
            assert dtypes(functools.partial(read, model), weights) == Dtypes(
                {stream}, {stream}, {"bfloat16"}
            )
    embed = functools.partial(model.apply, method="embed_bits")
    bits = jnp.ones((1, 4, TOY.tokenizer.bits))
    xy = jnp.zeros((4, 2), jnp.int32)
    assert jax.eval_shape(embed, {"params": params}, bits, xy).dtype == stream


@pytest.mark.parametrize("name", ["14b_16x", "14b_64x"])
def test_released_sizes(name):
    config = TextToImageConfig.released(name)
    assert from_dict(TextToImageConfig, to_dict(config)) == config
    assert config.size_multiple == {"14b_16x": 64, "14b_64x": 128}[name]
    if name == "14b_64x":
        released = golden_models.manifest()
        for ours, theirs in (("text", "llm"), ("head", "vision_head"), ("connector", "projector")):
            sizes = [np.prod(shape) for shape in released[f"BitDance-14B/{theirs}"].values()]
            assert sum(
                leaf.size for leaf in jax.tree.leaves(text_to_image.abstract_params(config)[ours])
            ) == sum(sizes)


def test_bad_config():
    with pytest.raises(ConfigError, match="tokens_per_step must be a square number, got 3"):
        dataclasses.replace(TOY, tokens_per_step=3)
    with pytest.raises(ConfigError, match="image_tokens reach id 51, and the vocabulary has 40"):
        dataclasses.replace(TOY, tokens_per_step=16)
    with pytest.raises(
        ConfigError, match="unknown text-to-image model '14b'; one of: 14b_16x, 14b_64x"
    ):
        TextToImageConfig.released("14b")
