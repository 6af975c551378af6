"""Prompts to images, with a model of two layers, tokens of 2 x 2 pixels and patches of 4 x 4."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from einops import rearrange
from flax import traverse_util
from processes import python

import bitdance_jax
from bitdance_jax import SamplerConfig
from bitdance_jax.config import MeshConfig
from bitdance_jax.errors import UserError
from bitdance_jax.io import model_folder
from bitdance_jax.models import prompt_rows, text_to_image
from bitdance_jax.nn.quantize import Quantized
from bitdance_jax.pipelines import memory, toy_text_to_image
from bitdance_jax.pipelines.batching import image_keys
from bitdance_jax.pipelines.checks import parse_size
from bitdance_jax.pipelines.text_to_image import TextToImage
from bitdance_jax.pipelines.tokenizer import decode_codes
from bitdance_jax.sampling import next_patch
from bitdance_jax.sampling.next_patch import noise_from_keys, resolve
from bitdance_jax.text.prompt_tokenizer import FOLDER, PromptTokenizer
from bitdance_jax.tokenizer.autoencoder import Autoencoder
from bitdance_jax.transformer import order


PROMPTS = ["a cat", "两只猫和一只狗", "three dogs under a tree"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "toy"
    toy_text_to_image.save(folder, tiny_models.TEXT_TO_IMAGE)
    return folder


@pytest.fixture(scope="module")
def model(folder) -> TextToImage:
    return TextToImage.load(folder)


@pytest.fixture(scope="module")
def generate(model) -> Callable[..., np.ndarray]:
    """Images of 12 x 8 pixels, two at a time."""

    def generate(prompts, **options):
        return model.sample(
            prompts, **{"size": "12x8", "batch_size": 2, "progress": False} | options
        )

    return generate


@pytest.fixture
def compiled(monkeypatch) -> list[float]:
    """Seconds of every compilation from here on."""
    seconds: list[float] = []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seconds
    jax.monitoring.unregister_event_duration_listener(listen)


def test_images_are_those_of_the_sampler(folder, model, generate):
    """Prompts in order, conditional rows before unconditional ones, each image's own key."""
    tokenizer = PromptTokenizer(folder / FOLDER)
    rows = [
        *(tokenizer.encode(prompt, 100) for prompt in PROMPTS[:2]),
        *[tokenizer.unconditional()] * 2,
    ]

    @jax.jit
    def draw(params, keys):
        prefixes, xy = (
            prompt_rows.prefix_rows(tiny_models.TEXT_TO_IMAGE, rows, 8, 12),
            jnp.asarray(text_to_image.token_positions(tiny_models.TEXT_TO_IMAGE, 8, 12)),
        )
        solver, scales = resolve(model.sampler, tiny_models.TEXT_TO_IMAGE.head.time_shift, 6)
        module = text_to_image.TextToImage(tiny_models.TEXT_TO_IMAGE)
        reader = text_to_image.PatchReader(module, params["model"], prefixes, xy)
        noise = noise_from_keys(keys, solver.num_noises, 4, 8)
        values = next_patch.sample(reader, noise=noise, solver=solver, scales=scales)
        codes = jnp.sign(rearrange(values, "n b p k -> b (n p) k"))
        grid = order.sequence_to_grid(codes, 4, 2, "patch").astype(jnp.int8)
        return decode_codes(
            Autoencoder(tiny_models.TEXT_TO_IMAGE.tokenizer), params["tokenizer"], grid, keys
        )

    expected = np.asarray(draw(model.params, image_keys(7, 0, 2)))
    images = generate(PROMPTS[:2], seed=7)
    assert images.shape == (2, 8, 12, 3) and images.dtype == np.uint8 and images.std() > 10
    np.testing.assert_allclose(images.astype(int), expected, atol=1)


def test_an_image_is_the_same_in_any_batch(generate):
    """Prompts of three lengths, two images each: two or five at a time, and from the fifth on."""
    images = generate(PROMPTS, images_per_input=2, seed=3)
    assert images.shape == (6, 8, 12, 3)
    assert len({image.tobytes() for image in images}) == 6
    np.testing.assert_allclose(
        generate(PROMPTS, images_per_input=2, seed=3, batch_size=5).astype(int), images, atol=1
    )
    np.testing.assert_allclose(
        generate(PROMPTS[2], images_per_input=2, seed=3, first_index=4).astype(int),
        images[4:],
        atol=1,
    )


def test_other_prompts_seeds_and_guidance_compile_nothing(model, generate, compiled):
    generate(PROMPTS)
    compiled.clear()
    guidance = {"guidance_scale": 5.5, "guidance_schedule": "linear", "guidance_start": 0.2}
    generate(PROMPTS, sampler=dataclasses.replace(model.sampler, **guidance))
    generate(["a longer prompt, still of the same bucket", "x", "y"], seed=1)
    generate(PROMPTS[0], images_per_input=3, seed=2)
    assert compiled == []


def test_steps_end_in_the_image(model, generate, compiled):
    """6 patches: after 1, 1 + 2 and 1 + 4 the others are grey. Only `sample`'s programs run."""
    final = generate(PROMPTS[:2], seed=5)
    compiled.clear()
    partial = list(model.sample_steps(PROMPTS[:2], every=2, size="12x8", seed=5))
    assert compiled == []
    assert [(part.sampled, part.patches) for part in partial] == [(1, 6), (3, 6), (5, 6), (6, 6)]
    np.testing.assert_array_equal(partial[-1].images, final)
    patches = [
        part.images.reshape(2, 2, 4, 3, 4, 3).transpose(1, 3, 0, 2, 4, 5).reshape(6, -1)
        for part in partial
    ]
    for part, pixels in zip(partial, patches, strict=True):
        assert np.all(pixels[part.sampled :] == 128) and not np.any(
            np.all(pixels[: part.sampled] == 128, axis=1)
        )


def test_without_guidance_and_with_the_linear_schedule(generate):
    """One row an image, and two that differ from the first patch on, without effect there."""
    plain, linear = (
        SamplerConfig(head_steps=1, guidance_scale=1.0),
        SamplerConfig(head_steps=1, guidance_scale=3.0),
    )
    one_patch = [
        generate(PROMPTS[:2], size="4x4", sampler=sampler).astype(int)
        for sampler in (plain, linear)
    ]
    np.testing.assert_allclose(*one_patch, atol=1)


def test_load_knows_the_kind(folder, tmp_path):
    loaded = bitdance_jax.load(folder)
    assert isinstance(loaded, TextToImage) and loaded.sampler == toy_text_to_image.SAMPLER
    assert "lm_head" not in loaded.params["model"]["text"] and list(loaded.params["tokenizer"]) == [
        "decoder"
    ]
    kept = traverse_util.flatten_dict(TextToImage.load(folder, weights="bfloat16").params, sep="/")
    assert {leaf.dtype.name for name, leaf in kept.items() if "norm" not in name} == {"bfloat16"}
    assert {leaf.dtype.name for name, leaf in kept.items() if "norm" in name} == {
        "float32"
    }  # in which norms compute
    with pytest.raises(
        UserError, match="holds a tokenizer, and a text-to-image model is needed here"
    ):
        TextToImage.load(tiny_models.save_tokenizer(tmp_path / "tokenizer"))


def test_from_weights_in_memory(folder, model, generate):
    """Stacked weights, as in training, give the same images; other weights compile nothing."""
    stored = model_folder.load(folder).params
    config = tiny_models.TEXT_TO_IMAGE
    tokenizer = bitdance_jax.Tokenizer(config.tokenizer, stored["tokenizer"])
    prompts = PromptTokenizer(folder / FOLDER)
    made = TextToImage(config, stored["model"], tokenizer, prompts, toy_text_to_image.SAMPLER)
    options = {"size": "12x8", "batch_size": 2, "progress": False}
    np.testing.assert_array_equal(made.sample(PROMPTS, **options), generate(PROMPTS))
    made.set_params(None)
    with pytest.raises(ValueError, match="set_params"):
        made.sample(PROMPTS, **options)
    made.set_params(jax.tree.map(lambda x: 0.9 * x, stored["model"]))
    before = made._execution.programs.sampler.advance._cache_size()
    assert (made.sample(PROMPTS, **options) != generate(PROMPTS)).any()
    assert made._execution.programs.sampler.advance._cache_size() == before == 1


def test_sizes():
    assert parse_size("2048x512") == (512, 2048) and parse_size((512, 2048)) == (512, 2048)
    with pytest.raises(UserError, match="size must be WIDTHxHEIGHT"):
        parse_size("512")
    with pytest.raises(UserError, match=r"^size must be WIDTHxHEIGHT .{,200}$"):
        parse_size("9" * 5000 + "x64")


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (
            "x",
            {"size": "12x10"},
            "width and height must be multiples of 4 up to 128 pixels, got 12x10",
        ),
        ("x", {"size": (8, 132)}, "up to 128 pixels, got 132x8"),
        (["x", " "], {}, "a prompt is empty; describe the image"),
        ("x" * 1100, {}, "tokens with its template, and at most 1022 fit; shorten it"),
        ("x", {"images_per_input": 0}, "images_per_input must be positive, got 0"),
        ("x", {"batch_size": 0}, "batch_size must be positive, got 0"),
        ("x", {"seed": -1}, "seed must be between 0 and 4294967295, got -1"),
    ],
)
def test_bad_input_is_refused_before_weights_are_read(folder, prompt, options, message):
    model = TextToImage.load(folder, lazy=True)
    model._place = None  # reading them would call it
    with pytest.raises(UserError, match=message):
        model.sample(prompt, **{"size": "12x8"} | options)
    with pytest.raises(UserError, match="every must be positive, got 0"):
        next(model.sample_steps("x", every=0))


def test_no_prompts_no_images(folder):
    model = TextToImage.load(folder)
    assert model.sample([], size="12x8", progress=False).shape == (0, 8, 12, 3)
    assert model.sample([], size="12x8", output="codes", progress=False).shape[0] == 0
    assert model.metadata([], size="12x8") == [] == list(model.batches((), size="12x8"))
    with pytest.raises(UserError, match="inputs is empty"):
        next(model.sample_steps([], every=1, size="12x8"))


def test_tokenizer_files_that_are_not_the_models(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    file = other / FOLDER / "tokenizer.json"
    file.write_text(toy_text_to_image.tokenizer_json(1))
    with pytest.raises(
        UserError, match=r"lacks special tokens that text-to-image needs: <\|query_1\|>"
    ):
        TextToImage.load(other, lazy=True)
    file.unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        TextToImage.load(other, lazy=True)
    file.write_bytes((folder / FOLDER / "tokenizer.json").read_bytes())
    config = json.loads((other / "config.json").read_text())
    config["config"]["image_tokens"]["first_resolution"] -= 1
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="are not the model's: their image tokens differ"):
        TextToImage.load(other, lazy=True)


def test_too_little_memory(folder, monkeypatch):
    monkeypatch.setattr(memory, "device_memory", lambda _: 1e6)
    model = TextToImage.load(folder, lazy=True)
    model._place = None
    with pytest.raises(UserError, match=r"a device are needed \(weights .* and cpu has 0\.0 GiB; "):
        model.sample("x", size="128x128")
    monkeypatch.setattr(memory, "device_memory", lambda _: 1e4)
    with pytest.raises(UserError, match=r"mesh\.tensor"):
        TextToImage.load(folder)


def test_int8(folder, model):
    """The layers' kernels are quantized, and nothing else."""
    layer = TextToImage.load(folder, weights="int8").params["model"]["text"]["layers_0"]
    assert isinstance(layer["mlp"]["down"]["kernel"], Quantized) and isinstance(
        layer["mlp_norm"]["scale"], jax.Array
    )
    exact, kernel = (
        model.params["model"]["text"]["layers_0"]["mlp"]["down"]["kernel"],
        layer["mlp"]["down"]["kernel"],
    )
    assert 0 < np.max(np.abs(kernel.values * kernel.scale - exact) / kernel.scale) < 0.51


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [False, True], ids=["modulated_each", "modulated_at_once"])
def test_on_a_mesh(folder, generate, tmp_path, at_once):
    """The same images from four devices, which share every layer; each program compiles once."""
    script = f"""
import sys, numpy as np
from bitdance_jax import MeshConfig, TextToImage
from bitdance_jax.heads import binary_diffusion as head
head.modulated_at_once = lambda *_: {at_once}
model = TextToImage.load(sys.argv[1], mesh=MeshConfig(data=2, tensor=2))
images = model.sample(["a cat", "x", "y"], size="12x8", seed=3, batch_size=2, progress=False)
np.save(sys.argv[2], images)
programs = model._execution.programs
sampler = programs.sampler
assert [f._cache_size() for f in (sampler.begin, sampler.advance, programs.decode)] == [1, 1, 1]
kernel = model.params["model"]["text"]["layers_0"]["mlp"]["up"]["kernel"]
assert kernel.addressable_shards[0].data.shape == (64, 48)
"""
    python(["-c", script, folder, "x.npy"], tmp_path, devices=4)
    expected = generate(["a cat", "x", "y"], seed=3)
    np.testing.assert_allclose(np.load(tmp_path / "x.npy").astype(int), expected, atol=1)


def test_a_mesh_that_does_not_fit(folder):
    with pytest.raises(UserError, match="does not divide"):
        TextToImage.load(folder, mesh=MeshConfig(data=1, tensor=3))
