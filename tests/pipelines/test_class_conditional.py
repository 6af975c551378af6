"""Loaded models: encoding and decoding in chunks; images depend on seed, index and label alone."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from same_images import assert_same_images

import bitdance_jax
from bitdance_jax import UserError
from bitdance_jax.config import SamplerConfig
from bitdance_jax.io import image_files
from bitdance_jax.pipelines.class_conditional import ClassConditionalPipeline
from bitdance_jax.sampling import next_patch


CLASSES = (
    "Activities",
    "Animals",
    "Flags",
    "Food",
    "Objects",
    "People",
    "Smileys",
    "Symbols",
    "Travel",
)
LABELS = [0, "Flags", 2, 7, 3]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny_models.save_tokenizer(root / "tokenizer")
    tiny_models.save_tokenizer(root / "gan", tiny_models.GAN_TOKENIZER)
    sampler = {
        "head_steps": tiny_models.SAMPLER.head_steps,
        "guidance_scale": tiny_models.SAMPLER.guidance_scale,
    }
    tiny_models.save_model(root / "model", class_names=list(CLASSES), sampler=sampler)
    return root


@pytest.fixture(scope="module")
def tokenizer(folders):
    return bitdance_jax.Tokenizer.load(folders / "tokenizer")


@pytest.fixture(scope="module")
def gan(folders):
    return bitdance_jax.Tokenizer.load(folders / "gan")


@pytest.fixture(scope="module")
def model(folders):
    return bitdance_jax.load(folders / "model")


@pytest.fixture(scope="module")
def drawn(model):
    """Five images in batches of two: the last batch is filled up."""
    return model.sample(LABELS, seed=3, batch_size=2, progress=False)


def count_traces(monkeypatch):
    """A list that gets a batch size whenever the sampler, here a quick one, is traced."""
    traces = []

    def quick(model, state, stop, **options):
        traces.append(state.values.shape[1])
        return state._replace(values=jnp.ones_like(state.values), patch=stop)

    monkeypatch.setattr(next_patch, "advance", quick)
    return traces


def test_sample(model, drawn):
    assert drawn.shape == (5, 16, 16, 3) and drawn.dtype == np.uint8
    assert len(np.unique(drawn, axis=0)) == 5
    codes = model.sample(LABELS, seed=3, batch_size=2, output="codes", progress=False)
    assert codes.dtype == np.int8 and codes.shape == (5, 8, 8, 8)
    assert set(np.unique(codes)) == {-1, 1}
    np.testing.assert_array_equal(model.tokenizer.decode(codes, 3), drawn)


@pytest.mark.parametrize("batch_size", [3, 32])
def test_the_batch_size_changes_nothing(model, drawn, batch_size):
    assert_same_images(model.sample(LABELS, seed=3, batch_size=batch_size, progress=False), drawn)


def test_going_on_from_a_first_index(model, drawn):
    first = model.sample(LABELS[:2], seed=3, batch_size=2, progress=False)
    rest = model.sample(LABELS[2:], seed=3, batch_size=2, first_index=2, progress=False)
    assert_same_images(np.concatenate([first, rest]), drawn)


def test_seed_number_and_label_all_count(model, drawn):
    def sample(labels, seed, first_index=0):
        return model.sample(labels, seed, batch_size=2, first_index=first_index, progress=False)

    assert (sample(LABELS[:2], 4) != drawn[:2]).any(axis=(1, 2, 3)).all()
    assert (sample([5, 5], 3) != drawn[:2]).any(axis=(1, 2, 3)).all()
    twice = sample([5, 5], 3)
    assert (twice[0] != twice[1]).any()


def test_one_compilation_for_each_batch_shape(folders, monkeypatch):
    model = bitdance_jax.load(folders / "model")
    traces = count_traces(monkeypatch)
    for seed, labels in enumerate(([1, 2, 3, 4, 5], [0, 8], ["Food"] * 3)):
        model.sample(labels, seed, batch_size=2, first_index=seed, progress=False)
    assert traces == [2]
    guidance = {"guidance_scale": 9.0, "guidance_schedule": "constant", "guidance_end": 0.5}
    sampler = dataclasses.replace(model.sampler, **guidance)
    model.sample([1, 2], sampler=sampler, batch_size=2, progress=False)
    assert traces == [2]
    model.sample([1], batch_size=2, progress=False)
    assert traces == [2, 1]


def test_going_on_with_a_gan_decoder(gan, monkeypatch):
    """Its noise goes by the image's number and the seed as well."""
    count_traces(monkeypatch)
    config = dataclasses.replace(tiny_models.MODEL, tokenizer=tiny_models.GAN_TOKENIZER)
    model = ClassConditionalPipeline(config, tiny_models.model_params(), gan)
    images = model.sample([0] * 4, seed=3, batch_size=2, progress=False)
    assert len(np.unique(images, axis=0)) == 4
    assert_same_images(model.sample([0] * 2, seed=3, first_index=2, progress=False), images[2:])
    assert (
        (model.sample([0] * 4, seed=4, batch_size=2, progress=False) != images)
        .any(axis=(1, 2, 3))
        .all()
    )


def test_the_model_samples_as_it_was_saved_unless_told_otherwise(model, drawn):
    assert model.sampler == tiny_models.SAMPLER
    same = model.sample(LABELS[:2], 3, sampler=tiny_models.SAMPLER, batch_size=2, progress=False)
    np.testing.assert_array_equal(same, drawn[:2])
    unguided = model.sample(
        LABELS[:2], 3, sampler=SamplerConfig(head_steps=3), batch_size=2, progress=False
    )
    assert (unguided != drawn[:2]).any()


def test_no_labels_no_images(model):
    assert model.sample([], progress=False).shape == (0, 16, 16, 3)


@pytest.mark.parametrize(
    ("label", "number"), [(0, 0), (8, 8), ("7", 7), ("Flags", 2), ("Travel", 8)]
)
def test_labels(model, label, number):
    assert model.label(label) == number


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("flag", "unknown label 'flag'; did you mean 'Flags'?"),
        ("xyz", f"unknown label 'xyz'; the model has: {', '.join(CLASSES)}"),
        (9, "label 9 is out of range; the model has labels 0 to 8"),
        ("9", "label 9 is out of range; the model has labels 0 to 8"),
        (-1, "label -1 is out of range; the model has labels 0 to 8"),
    ],
)
def test_unknown_labels_are_one_line(model, label, message):
    with pytest.raises(UserError) as caught:
        model.sample([0, label], progress=False)
    assert str(caught.value) == message


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_size_that_cannot_be(model, batch_size):
    with pytest.raises(UserError, match=f"batch_size must be positive, got {batch_size}"):
        model.sample([0], batch_size=batch_size, progress=False)


def test_a_name_wins_over_a_number(tokenizer):
    named = ClassConditionalPipeline(
        tiny_models.MODEL,
        tiny_models.model_params(),
        tokenizer,
        class_names=[str(9 - i) for i in range(9)],
    )
    assert named.label("9") == 0 and named.label(8) == 8


def test_classes_without_names_have_numbers(tmp_path):
    model = bitdance_jax.load(tiny_models.save_model(tmp_path / "model"))
    assert model.class_names == tuple("012345678")
    assert model.sampler == SamplerConfig()


def test_bfloat16(folders):
    model = bitdance_jax.load(folders / "model", dtype=jnp.bfloat16)
    assert {a.dtype.name for a in _leaves(model.tokenizer.params)} == {"bfloat16"}
    for path, weight in jax.tree_util.tree_leaves_with_path(model.params["model"]):
        names = [part.key for part in path]
        added = names[0] in (
            "class_embedding",
            "query_tokens",
            "position_embedding",
        )  # to the residual stream
        assert weight.dtype == (
            "float32" if added or "norm" in names[-2 if len(path) > 1 else -1] else "bfloat16"
        ), path
    codes = model.sample([0, 1], output="codes", progress=False)
    assert codes.dtype == np.int8 and set(np.unique(codes)) == {-1, 1}
    images = model.tokenizer.decode(codes)
    exact = bitdance_jax.load(folders / "model").tokenizer.decode(codes)
    assert (images != exact).any()
    assert np.corrcoef(images.ravel(), exact.ravel())[0, 1] > 0.98


def edit(folder, change):
    path = folder / "config.json"
    header = json.loads(path.read_text())
    change(header)
    path.write_text(json.dumps(header))


def test_a_missing_folder_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^no model folder .*nowhere$"):
        bitdance_jax.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        (
            "tokenizer",
            lambda h: h["config"].update(bits=16),
            "weights in .* do not fit the model: .* more differ$",
        ),
        (
            "model",
            lambda h: h["config"]["transformer"].update(num_layers=3),
            "weights in .* do not fit the model: .* more differ$",
        ),
        (
            "model",
            lambda h: h["config"]["tokenizer"].update(ch=64),
            "do not fit the model: tokenizer/.*",
        ),
        (
            "tokenizer",
            lambda h: h.update(kind="class_conditional"),
            r"config\.json: config has unknown fields: ",
        ),
        (
            "model",
            lambda h: h.update(kind="tokenizer"),
            "holds a tokenizer, which samples no images",
        ),
        (
            "model",
            lambda h: h["config"].pop("head"),
            r"config\.json: config lacks the fields: head$",
        ),
        (
            "model",
            lambda h: h["metadata"].update(class_names=["a", "b"]),
            "^9 classes need as many class_names, got 2$",
        ),
        (
            "model",
            lambda h: h["metadata"].update(class_names=9),
            r"metadata\.class_names cannot be read: Expected array . null, got int",
        ),
        (
            "model",
            lambda h: h["config"]["transformer"].update(dim=2**17),
            "the model in .*altered takes .* GiB on each device, and cpu has",
        ),
        (
            "model",
            lambda h: h["config"].update(image_size=-4),
            r"config\.json: config\.image_size must be positive, got -4",
        ),
        ("model", lambda h: h.update(config=[]), "config and metadata must be objects"),
        (
            "model",
            lambda h: h["metadata"]["sampler"].update(steps=3),
            r"metadata\.sampler has unknown fields: steps; known: ",
        ),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_one_line(
    folders, tmp_path, source, change, message
):
    folder = tmp_path / "altered"
    shutil.copytree(folders / source, folder)
    edit(folder, change)
    with pytest.raises(UserError, match=message) as caught:
        (bitdance_jax.Tokenizer if source == "tokenizer" else bitdance_jax).load(folder)
    assert "\n" not in str(caught.value)


def test_the_lines_of_the_package_docstring(model):
    images = model.sample(["Flags", 3], seed=0)
    codes = model.tokenizer.encode(images)
    again = model.tokenizer.decode(codes)
    assert (images.shape, codes.shape, again.shape) == (
        (2, 16, 16, 3),
        (2, 8, 8, 8),
        (2, 16, 16, 3),
    )
    assert image_files.grid(images, columns=2).ndim == 3


def _leaves(tree):
    return (
        [leaf for value in tree.values() for leaf in _leaves(value)]
        if isinstance(tree, dict)
        else [tree]
    )
