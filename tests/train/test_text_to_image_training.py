"""Text-to-image training at toy size: what a user gets, and what the result must not depend on."""

import csv
import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import processes
import pytest
import tiny_models
from PIL import Image

import bitdance_jax
from bitdance_jax.config import (
    ImageTokens,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    Qwen3Config,
    RunConfig,
    TextToImageConfig,
    to_dict,
)
from bitdance_jax.convert import peft
from bitdance_jax.convert.export import export
from bitdance_jax.data.captioned import CaptionedImage
from bitdance_jax.data.captioned_token_writer import describe_captioned, tokenize_captioned
from bitdance_jax.data.conversation_config import ConversationDataConfig
from bitdance_jax.data.conversations import Conversation, ConversationSample, Turn
from bitdance_jax.data.documents import Image as ImageOfDocument
from bitdance_jax.data.documents import Text, make_document
from bitdance_jax.data.edit_config import EditDataConfig
from bitdance_jax.data.edits import Edit, EditSample
from bitdance_jax.data.image_encoder import ImageEncoder
from bitdance_jax.data.mixture import Sample
from bitdance_jax.data.packing import Lengths
from bitdance_jax.data.token_writer import prepare
from bitdance_jax.distributed.mesh import make_mesh, put_batch
from bitdance_jax.distributed.sharding import put
from bitdance_jax.errors import UserError
from bitdance_jax.io import model_folder, model_lookup
from bitdance_jax.io.orbax_weights import StoredArray
from bitdance_jax.nn import lora
from bitdance_jax.pipelines import toy_text_to_image
from bitdance_jax.pipelines.tokenizer import Tokenizer
from bitdance_jax.plan.programs import training_step
from bitdance_jax.text.prompt_tokenizer import FOLDER
from bitdance_jax.train.initial import initial_params
from bitdance_jax.train.loop import train
from bitdance_jax.train.performance import training_flops
from bitdance_jax.train.run_folder import check_config
from bitdance_jax.train.sample_documents import Documents
from bitdance_jax.train.state import (
    TrainState,
    abstract_state,
    init_state,
    learning_rate_schedule,
    make_optimizer,
)
from bitdance_jax.train.step import make_train_step
from bitdance_jax.train.text_to_image_config import PackedDataConfig, PreviewConfig
from bitdance_jax.train.text_to_image_init import open_prompts, prompt_files
from bitdance_jax.train.text_to_image_objective import visible_pairs
from bitdance_jax.train.text_to_image_training import TextToImageTraining
from bitdance_jax.transformer import qwen3


MODEL = tiny_models.TEXT_TO_IMAGE
IMAGES = 24
MESH = make_mesh(MeshConfig(), jax.devices()[:1])


def make_images(folder: Path) -> Path:
    """Captioned images of several sizes."""
    rng = np.random.default_rng(0)
    lines = []
    folder.mkdir()
    for number in range(IMAGES):
        height, width = ((8, 8), (16, 16), (12, 24), (32, 16))[number % 4]
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        caption = f"number {number}" if number else "a long one, " * 20
        lines.append(json.dumps({"file_name": f"{number}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    pairs = [
        {"source": f"{number}.png", "target": f"{number + 4}.png", "instruction": f"add {number}"}
        for number in range(IMAGES - 4)
    ]
    pairs = [pair | {"split": "train" if n else "test"} for n, pair in enumerate(pairs)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return folder


def wider() -> TextToImageConfig:
    """The model with 16 tokens a step."""
    ids = toy_text_to_image.config(16).image_tokens
    return MODEL.with_tokens_per_step(16, ids)


def make_init(folder: Path) -> Path:
    """A model folder as a converted release is one."""
    toy_text_to_image.save(folder, MODEL)
    return folder


def make_config(folder: Path, workdir: str = "another", **changes) -> TextToImageTraining:
    config = TextToImageTraining(
        run=RunConfig(
            workdir=str(folder / workdir),
            steps=3,
            log_every=1,
            save_every=2,
            preview_every=3,
            keep=5,
        ),
        model=MODEL,
        data=PackedDataConfig(
            paths=(str(folder / "images"),),
            batch_size=4,
            resolutions=(8, 16),
            resolution_weights=(1.0, 2.0),
            packing=Lengths(target=100, row=140, document=120, buffer=3),
            max_prompt=60,
            edits=EditDataConfig(
                paths=(str(folder / "images" / "pairs.jsonl"),), share=0.25, resolution=8
            ),
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            warmup_steps=1,
            schedule="constant",
            eps=1e-15,
            weight_decay=0.0,
            ema_decay=None,
        ),
        init=str(folder / "init"),
        preview=PreviewConfig(
            head_steps=2, guidance_scale=1.0, per_prompt=1, prompts=str(folder / "prompts.txt")
        ),
    )
    return dataclasses.replace(config, **changes)


def tiny_text(**changes):
    return dataclasses.replace(MODEL.text, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images, prompts and models to start from."""
    folder = tmp_path_factory.mktemp("text_to_image")
    make_images(folder / "images")
    make_init(folder / "init")
    toy_text_to_image.save(folder / "init16", wider())
    (folder / "prompts.txt").write_text("a cat\n\ntwo dogs\n")
    return folder


@pytest.fixture(scope="module")
def trained(folder) -> Path:
    """With a run of three steps."""
    run(make_config(folder, "run"))
    return folder


def run(config: TextToImageTraining) -> None:
    train(config.make_task(), config, mesh=MESH, initial=initial_params(config))


def rows(workdir: Path) -> list[dict[str, str]]:
    with (workdir / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_run_writes_metrics_previews_and_a_model(trained):
    folder = trained
    last = rows(folder / "run")[-1]
    assert {
        "vision_loss",
        "text_loss",
        "images",
        "filled",
        "eval_vision_loss_8",
        "eval_vision_loss_16",
    } <= last.keys()
    assert 0.5 < float(last["filled"]) <= 1
    assert float(last["images"]) == round(float(last["images"])) >= 4
    by_resolution = float(last["images_8"]) + float(last["images_16"])
    by_source = float(last["documents_source_1"]) + float(last["documents_edits"])
    # Each document of this run has one image that is generated.
    assert float(last["images"]) == pytest.approx(by_resolution) == pytest.approx(by_source)
    assert np.asarray(Image.open(folder / "run/images/samples_0000003.png")).shape[0] >= 2 * 16
    model = bitdance_jax.load(folder / "run")
    assert model.default_size == (16, 16)
    assert model.sample(["a cat"], progress=False).shape == (1, 16, 16, 3)
    export(str(folder / "run/model"), str(folder / "released"))
    assert {"model.safetensors.index.json", "vision_head.safetensors", "tokenizer.json"} <= {
        path.name for path in (folder / "released").iterdir()
    }


@pytest.mark.slow
def test_a_run_continues_from_a_checkpoint_as_if_nothing_had_happened(trained):
    """The third step needs the packing buffer of the second, which is saved."""
    folder = trained
    again = folder / "again"
    shutil.copytree(folder / "run", again)
    shutil.rmtree(again / "checkpoints/3")
    shutil.rmtree(again / "model")
    state = json.loads(next((again / "checkpoints/2/iterator").iterdir()).read_text())
    assert any(row["waiting"] for row in state["rows"].values())
    assert bitdance_jax.load(again).sample(["a cat"], progress=False).shape == (1, 16, 16, 3)
    run(make_config(folder, "again"))
    assert (again / "metrics.csv").read_bytes() == (folder / "run/metrics.csv").read_bytes()
    one, other = (model_folder.load(folder / name / "model").params for name in ("run", "again"))
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.slow
def test_tokens_ahead_of_time_give_the_same_batches(folder, tmp_path):
    config = make_config(folder)
    tokenizer = make_config(folder).make_task()._tokenizer
    train, _ = config.data.open_marked()
    manifest = describe_captioned(
        train,
        [],
        tokenizer.config,
        tokenizer.params,
        resolutions=config.data.resolutions,
        size_multiple=MODEL.size_multiple,
    )
    prepare(tmp_path, manifest)
    tokenize_captioned(train, [], tokenizer.params, folder=tmp_path, manifest=manifest)
    data = dataclasses.replace(config.data, paths=(str(tmp_path),))
    cached = dataclasses.replace(config.data, cache_latents=True)
    of_images, of_tokens, in_memory = (
        next(dataclasses.replace(config, data=changed).make_task().batches(np.arange(4)))
        for changed in (config.data, data, cached)
    )
    assert of_images.keys() == of_tokens.keys() == in_memory.keys()
    assert 0 < np.sum(of_images["generated"]) < np.sum(of_images["visual"][..., 0] < 140)
    for name, values in of_images.items():
        np.testing.assert_array_equal(of_tokens[name], values, name)
        np.testing.assert_array_equal(in_memory[name], values, name)
    with pytest.raises(UserError, match="are of another tokenizer of the same sizes"):
        make_config(folder, data=data, tokenizer=str(folder / "init16")).make_task()


@pytest.mark.slow
def test_batches_are_those_that_the_step_is_planned_for(folder, capsys):
    """A caption that is too long is cut, and named once."""
    config = make_config(folder)
    task = config.make_task()
    batches = task.batches(np.arange(4))
    for _ in range(4):
        batch = next(batches)
    batches.close()
    lines = [line for line in capsys.readouterr().err.splitlines() if "it is cut" in line]
    assert len(lines) == 1
    assert "'a long one, a long one" in lines[0]
    abstract = task.objective.abstract_batch(4)
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        name: (x.shape, x.dtype) for name, x in abstract.items()
    }
    program = training_step(config, MESH)
    assert program.model_flops > 0
    program.function.lower(*program.arguments)


def test_the_encoder_gives_the_tokenizers_bits_whatever_the_other_images(folder):
    tokenizer = Tokenizer.load(folder / "init")
    rng = np.random.default_rng(0)
    images = [
        rng.integers(0, 256, (*size, 3), np.uint8) for size in ((8, 8), (16, 8), (8, 8), (16, 8))
    ]
    encode = ImageEncoder(tokenizer.config, tokenizer.params, "float32")
    together = encode(images)
    for image, bits in zip(images, together, strict=True):
        np.testing.assert_array_equal(bits, np.packbits(tokenizer.encode(image[None])[0] > 0, -1))
    np.testing.assert_array_equal(encode(images[1:2])[0], together[1])


def test_a_model_with_more_tokens_a_step_inherits_all_but_new_queries(folder):
    config = make_config(folder, model=wider())
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, packing=Lengths(target=150, row=200))
    )
    given, before = initial_params(config), model_folder.load(folder / "init").params["model"]
    rows = MODEL.text.vocab_size
    assert given["text"]["embed_tokens"]["embedding"].shape[0] == rows + 12
    np.testing.assert_array_equal(
        given["text"]["embed_tokens"]["embedding"][:rows],
        before["text"]["embed_tokens"]["embedding"].astype(np.float32),
    )
    np.testing.assert_array_equal(
        given["head"]["cond_embed"]["kernel"],
        before["head"]["cond_embed"]["kernel"].astype(np.float32),
    )
    assert "<|query_15|>" in config.make_task().record.files[f"{FOLDER}/tokenizer.json"].decode()


def test_a_prompt_tokenizer_from_captions(folder, tmp_path):
    """It knows their words, reads no images, and its ids are the model's."""
    images = shutil.copytree(folder / "images", tmp_path / "images")
    for image in images.glob("*.png"):
        image.write_bytes(b"")
    data = dataclasses.replace(make_config(folder).data, paths=(str(images),))
    ids = ImageTokens.of_vocabulary(300, num_resolutions=8)
    model = dataclasses.replace(MODEL, image_tokens=ids)
    config = make_config(folder, model=model, data=data, text_tokenizer="captions")
    prompts = open_prompts(prompt_files(config, data.open_splits()[0]), model)
    by_bytes = open_prompts(prompt_files(make_config(folder), []), MODEL)
    short, long = (len(one.encode("number 7", 100)) for one in (prompts, by_bytes))
    assert short < long - len("number")


def test_an_image_with_a_longer_side_than_the_model_takes(folder):
    ids = ImageTokens.of_vocabulary(256, num_resolutions=8)
    model = dataclasses.replace(MODEL, image_tokens=ids)
    config = make_config(folder, model=model, text_tokenizer="captions")
    documents = Documents(config, open_prompts(prompt_files(config, []), model))
    record = CaptionedImage(("wide",), image=np.zeros((8, 32, 3), np.uint8))
    with pytest.raises(UserError, match=r"'wide' in photos has 32x8 pixels, .* sides up to 16;"):
        documents(Sample(record, "wide", (8, 32), "photos", 16))


def test_a_language_model_gives_the_text_part(folder):
    text = tiny_text(vocab_size=MODEL.text.vocab_size - 40)
    params = qwen3_params(text)
    model_folder.save(
        folder / "language",
        kind="language_model",
        config=to_dict(text),
        params=params,
        metadata={},
    )
    config = make_config(
        folder,
        init=str(folder / "language"),
        tokenizer=str(folder / "init"),
        text_tokenizer=str(folder / "init"),
    )
    given = initial_params(config)
    assert set(given) == {"text"}
    assert given["text"]["lm_head"]["kernel"].shape[1] == MODEL.text.vocab_size
    np.testing.assert_array_equal(
        given["text"]["norm"]["scale"], params["norm"]["scale"].astype(np.float32)
    )


def qwen3_params(config: Qwen3Config):
    return toy_text_to_image.random_params(qwen3.abstract_params(config))


def test_frozen_parts_have_no_optimizer_state_and_stay_as_they_are(folder):
    config = make_config(folder, freeze=("text/layers", "connector"))
    objective = config.make_objective()
    optimizer = make_optimizer(config.optimizer, lambda _: 1e-3, objective)
    state = abstract_state(objective, optimizer, MESH, ema=False)
    paths = {
        "/".join(str(part.key) for part in path if hasattr(part, "key"))
        for path, _ in jax.tree_util.tree_leaves_with_path(state)
    }
    assert any(path.startswith("text/norm") for path in paths)
    assert not any(path.startswith(("text/layers", "connector")) for path in paths)
    task = config.make_task()
    task.export(
        jax.tree.map(np.zeros_like, initial_params(config)),
        str(folder / "frozen"),
        step=1,
        metrics={},
    )
    exported, init = (
        model_folder.load(folder / name).params["model"] for name in ("frozen", "init")
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        exported["connector"],
        jax.tree.map(lambda x: x.astype(np.float32), init["connector"]),
    )
    assert not exported["head"]["cond_embed"]["kernel"].any()


LORA = LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "projector.fc1", "attn.wqkv"))


@pytest.mark.slow
def test_adapters_alone_train_and_are_peft_files(trained, capsys):
    folder = trained
    config = make_config(folder, "lora", lora=LORA)
    run(config)
    adapters = peft.load(str(folder / "lora"), MODEL)
    assert adapters.config.scale == LORA.scale
    assert adapters.base == model_lookup.fingerprint(folder / "init")
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(adapters.params))
    objective = config.make_objective()
    optimizer = make_optimizer(config.optimizer, lambda _: 1e-3, objective)
    state = abstract_state(objective, optimizer, MESH, ema=False)
    numbers = sum(x.size for x in jax.tree.leaves(adapters.params))
    # Parameters, both moments, and AdamW's two counters with the step.
    assert sum(x.size for x in jax.tree.leaves(state)) == 3 * numbers + 3

    with pytest.raises(UserError, match=rf"trains an adapter .* give {folder}/init as the model"):
        bitdance_jax.load(folder / "lora")
    check_config(config)  # The finished run may be started again.

    shutil.copytree(folder / "run", folder / "cut")
    shutil.rmtree(folder / "cut/model")  # As a run that has not finished.
    adapted = bitdance_jax.load(folder / "cut", lora=folder / "lora").params["model"]
    np.testing.assert_allclose(
        adapted["text"]["layers_1"]["attention"]["q"]["lora_b"],
        LORA.scale * adapters.params["text"]["layers"]["attention"]["q"]["lora_b"][1],
        rtol=1e-6,
    )


def test_attention_counts_what_the_mask_lets_through(folder):
    text = Text(np.zeros(9, np.int32), np.ones(9, bool))
    for size in ((8, 8), (16, 8)):
        document = make_document(MODEL, [text, ImageOfDocument(None, size), text])
        image = document.visual.size
        pairs = visible_pairs(len(document), image, MODEL.tokens_per_step)
        assert pairs == document.limits.sum()
    config = make_config(folder)
    flops = []
    for row in (140, 280):
        packing = dataclasses.replace(config.data.packing, row=row)
        data = dataclasses.replace(config.data, packing=packing)
        objective = dataclasses.replace(config, data=data).make_objective()
        flops.append(training_flops(objective, 2))
    assert flops[1] == pytest.approx(2 * flops[0])


def test_initial_weights_are_read_where_they_are_put(folder, monkeypatch):
    read, parts = StoredArray.__getitem__, []
    monkeypatch.setattr(
        StoredArray, "__getitem__", lambda self, index: parts.append(index) or read(self, index)
    )
    given = initial_params(make_config(folder))
    assert not parts
    saved = model_folder.load(folder / "init").params["model"]
    jax.tree.map(np.testing.assert_array_equal, put(MESH, given), saved)
    embedding = given["text"]["embed_tokens"]["embedding"].astype("bfloat16")
    part = embedding[:, 4:6]
    np.testing.assert_array_equal(
        part, saved["text"]["embed_tokens"]["embedding"][:, 4:6].astype(part.dtype)
    )
    assert part.dtype.name == "bfloat16"


def test_adapters_continue_from_an_adapter(folder):
    params = lora.initial(peft.adapted(MODEL, LORA), LORA.rank, jax.random.key(0))
    params = jax.tree.map(lambda x: np.asarray(x) + 1, params)
    start = str(folder / "adapter")
    peft.save(start, peft.Adapters(LORA, params), MODEL, base="")

    def given(**changes):
        settings = dataclasses.replace(LORA, **{"init": start} | changes)
        return initial_params(make_config(folder, lora=settings))

    halved = given(alpha=2 * LORA.alpha)["connector"]["fc1"]
    kernel = params["connector"]["fc1"]
    np.testing.assert_array_equal(halved["lora_a"], kernel["lora_a"])
    np.testing.assert_array_equal(halved["lora_b"], kernel["lora_b"] / 2)
    with pytest.raises(UserError, match=r"has rank 2, and lora\.rank is 3; set lora\.rank 2"):
        given(rank=3)
    with pytest.raises(UserError, match=r"fc1 q_proj wqkv, and lora\.targets are q_proj"):
        given(targets=("q_proj",))
    with pytest.raises(UserError, match="is no LoRA adapter"):
        given(init=str(folder / "init"))
    with pytest.raises(UserError, match="init needs a rank"):
        given(rank=0)


@functools.cache
def initial_state(config: TextToImageTraining) -> TrainState:
    objective = config.make_objective()
    optimizer = make_optimizer(config.optimizer, lambda _: 1e-2, objective)
    init = jax.jit(lambda key: init_state(objective, optimizer, key, ema=False))
    return jax.device_get(init(jax.random.key(0)))


def losses(config: TextToImageTraining, mesh_config: MeshConfig, accumulate: int) -> list[float]:
    """Of two steps on the same rows."""
    mesh = make_mesh(
        mesh_config, jax.devices()[: mesh_config.data * mesh_config.fsdp * mesh_config.tensor]
    )
    task = config.make_task()
    objective = task.objective
    optimizer = make_optimizer(config.optimizer, lambda _: 1e-2, objective)
    schedule = learning_rate_schedule(config.optimizer, 2)
    step = make_train_step(
        objective, optimizer, schedule, mesh=mesh, ema_decay=None, accumulate=accumulate
    )
    places = jax.tree.map(
        lambda x: x.sharding, abstract_state(objective, optimizer, mesh, ema=False)
    )
    state = jax.device_put(initial_state(config), places)
    batches = task.batches(np.arange(task.batch_size))
    results = []
    for _ in range(2):
        batch = put_batch(mesh, next(batches), task.batch_size)
        state, metrics = step(state, {}, batch, jax.random.key(1))
        results += [float(metrics[name]) for name in ("loss", "vision_loss", "text_loss", "images")]
    batches.close()
    return results


def on_eight_devices(folder: str) -> None:
    """The same on one device, on eight, and with micro-batches of unequal numbers of tokens."""
    config = make_config(Path(folder))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, remat="nothing"))
    expected = losses(config, MeshConfig(1, 1, 1), 1)
    np.testing.assert_allclose(losses(config, MeshConfig(2, 2, 2), 1), expected, rtol=2e-5)
    np.testing.assert_allclose(losses(config, MeshConfig(2, 1, 1), 2), expected, rtol=2e-5)


@pytest.mark.slow
def test_the_loss_does_not_depend_on_mesh_and_micro_batches(folder):
    processes.python([__file__, str(folder)], Path(__file__).parents[1], devices=8)


def shows_conversations(resolution: int):
    conversations = ConversationDataConfig(paths=("any.jsonl",), resolution=resolution)
    return {"data": {"conversations": conversations}}


def shows_pairs(**changes):
    edits = EditDataConfig(paths=("any.jsonl",))
    return {"data": {"edits": dataclasses.replace(edits, **{"resolution": 8} | changes)}}


def test_what_cannot_be_read_is_known_before_anything_compiles(folder, tmp_path, capsys):
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A cat."}]
    records = [{"image": "gone.png", "conversations": turns}, {"id": 1}]
    file = tmp_path / "talks.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    data = make_config(folder).data
    talks = ConversationDataConfig(paths=(str(file),), resolution=16)
    config = make_config(folder, data=dataclasses.replace(data, conversations=talks))
    with pytest.raises(UserError, match=r"1 image is damaged; the last: .*gone\.png"):
        config.make_task()
    line = f"{file}: 1 conversations; skipped: conversations of another form: 1 (line 2)"
    assert line in capsys.readouterr().err.splitlines()

    silent = tmp_path / "silent"
    silent.mkdir()
    Image.new("RGB", (8, 8)).save(silent / "a.png")
    (silent / "a.txt").write_text(" \n")
    data = dataclasses.replace(data, paths=(str(silent),), held_out=(str(folder / "images"),))
    with pytest.raises(UserError, match=r"a\.png has no caption, or an empty one"):
        make_config(folder, data=data).make_task()


def test_a_conversation_that_is_longer_than_a_document_is_named(folder):
    talks = ConversationDataConfig(paths=("talks.jsonl",), resolution=16)
    data = dataclasses.replace(make_config(folder).data, conversations=talks)
    config = make_config(folder, data=data)
    documents = Documents(config, open_prompts(prompt_files(config, []), MODEL))

    def sample(answers: int) -> ConversationSample:
        turns = (Turn("user", "what is it"), Turn("assistant", "a cat")) * answers
        return ConversationSample(Conversation((), turns), "talks.jsonl")

    short = documents(sample(1))
    assert short.document is not None and not short.notes
    assert len(short.document) <= config.data.packing.longest
    long = documents(sample(20))
    assert long.document is None
    (line,) = (note.line for note in long.notes)
    assert "'what is it' in talks.jsonl has" in line
    assert "a document 120 at most (data.packing.document); it is skipped" in line


def test_a_pair_that_is_longer_than_a_document_is_named(folder):
    config = make_config(folder)
    documents = Documents(config, open_prompts(prompt_files(config, []), MODEL))

    def prepared(side: int, instruction: str):
        image = CaptionedImage(("a cat",), np.zeros((side, side, 3), np.uint8))
        edit = Edit(image, image, (instruction,))
        return documents(EditSample(edit, instruction, "pairs.jsonl"))

    assert prepared(8, "add a hat").document is not None
    for side, instruction, problem in (
        (32, "add a hat", "tokens with its images, and a document 120 at most"),
        (8, "add a hat " * 10, "more than 60 tokens with its template (data.max_prompt)"),
    ):
        skipped = prepared(side, instruction)
        assert skipped.document is None
        (line,) = (note.line for note in skipped.notes)
        assert problem in line and "'add a hat" in line and "in pairs.jsonl" in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": ("tex",)}, "freeze tex is no part of the model"),
        ({"freeze": ("text",), "init": None}, "tokenizer needs a model folder"),
        ({"init": "{run}/nothing"}, "nothing"),
        ({"data": {"resolutions": (10,), "resolution_weights": ()}}, "multiples of 4 pixels"),
        ({"data": {"resolutions": (64,), "resolution_weights": ()}}, "raise data.packing.document"),
        (shows_conversations(10), "data.conversations.resolution must be multiples of 4 pixels"),
        (shows_conversations(64), "or lower data.conversations.resolution"),
        (shows_pairs(resolution=16), "two images of 16 pixels .* or lower data.edits.resolution"),
        (shows_pairs(paths=("{run}/gone.jsonl",)), r"gone\.jsonl"),
        ({"data": {"paths": ()}}, "data.paths"),
        ({"model": {"text": tiny_text(hidden_dim=48)}}, "hidden_dim is 96 there and 48 here"),
        ({"init": "{run}/init16"}, "not change from 16 to 4"),
        ({"preview": {"prompts": "{run}/empty.txt"}}, "has no prompts"),
        ({"preview": {"size": "10x8"}}, "preview.size: width and height must be multiples of 4"),
        ({"lora": {"rank": 4, "targets": ("c_attn",)}}, "lora.targets c_attn is no linear layer"),
        ({"lora": {"rank": 500}}, "lora.rank 500 is larger"),
        ({"lora": {"rank": 4}, "freeze": ("text",)}, "lora.rank adapts the weights of init"),
        ({"text_weight": 0.0, "vision_weight": 0.0}, "there is no loss"),
    ],
)
def test_bad_input_is_one_line_before_anything_compiles(folder, changes, message):
    (folder / "empty.txt").write_text("\n\n")
    config = make_config(folder)

    def filled(value):
        return value.format(run=folder) if isinstance(value, str) else value

    def changed():
        fields = {}
        for name, value in changes.items():
            if isinstance(value, dict):
                inner = {field: filled(x) for field, x in value.items()}
                value = dataclasses.replace(getattr(config, name), **inner)
            fields[name] = filled(value)
        return dataclasses.replace(config, **fields)

    with pytest.raises(UserError, match=message) as caught:
        made = changed()
        initial_params(made)
        made.make_task()
    assert "\n" not in str(caught.value)


if __name__ == "__main__":
    import sys

    on_eight_devices(sys.argv[1])
