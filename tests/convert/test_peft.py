"""Adapters as PEFT's files, and models that are sampled with them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from tiny_models import TEXT_TO_IMAGE

from bitdance_jax.config import ConfigError, LoraConfig
from bitdance_jax.convert import peft
from bitdance_jax.errors import FileError
from bitdance_jax.io import model_lookup
from bitdance_jax.nn import lora
from bitdance_jax.nn.stack import unstack
from bitdance_jax.pipelines import toy_text_to_image
from bitdance_jax.pipelines.load import load


LORA = LoraConfig(rank=3, alpha=6.0, targets=("q_proj", "down_proj", "projector.fc1", "attn.wqkv"))
QWEN = "base_model.model.model.layers."


@pytest.fixture(scope="module")
def adapters():
    params = lora.initial(peft.adapted(TEXT_TO_IMAGE, LORA), LORA.rank, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), params)
    return peft.Adapters(LORA, params)


@pytest.fixture
def folder(adapters, tmp_path):
    peft.save(str(tmp_path / "adapter"), adapters, TEXT_TO_IMAGE, base="models/toy")
    return tmp_path / "adapter"


def edit(folder, **values):
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(content | values))


def test_names_and_layout(folder, adapters):
    record = json.loads((folder / "adapter_config.json").read_text())
    assert (record["peft_type"], record["r"], record["lora_alpha"]) == ("LORA", 3, 6)
    assert record["target_modules"] == list(LORA.targets)
    assert record["base_model_name_or_path"] == "models/toy"
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    text = TEXT_TO_IMAGE.text
    assert {f"{QWEN}{i}.self_attn.q_proj.lora_{x}.weight" for i in (0, 1) for x in "AB"} < set(
        tensors
    )
    q = adapters.params["text"]["layers"]["attention"]["q"]
    for letter, ours, shape in (
        ("A", q["lora_a"], (3, text.dim)),
        ("B", q["lora_b"], (text.num_heads * text.head_dim, 3)),
    ):
        theirs = tensors[f"{QWEN}1.self_attn.q_proj.lora_{letter}.weight"]
        assert theirs.shape == shape
        np.testing.assert_array_equal(theirs, ours[1].T)
    head = "base_model.model.vision_head.net.res_blocks.0.attn.wqkv.lora_B.weight"
    assert tensors[head].shape == (3 * TEXT_TO_IMAGE.head.width, 3)
    assert "base_model.model.projector.fc1.lora_A.weight" in tensors


def test_there_and_back(folder, adapters):
    again = peft.load(str(folder), TEXT_TO_IMAGE)
    jax.tree.map(np.testing.assert_array_equal, again.params, adapters.params)
    assert again.config.scale == LORA.scale == 2.0
    assert set(again.config.targets) == {"q_proj", "down_proj", "fc1", "wqkv"}
    edit(folder, use_rslora=True)
    assert peft.load(str(folder), TEXT_TO_IMAGE).config.scale == pytest.approx(6 / 3**0.5)
    with pytest.raises(FileError, match="exists; choose a new folder"):
        peft.save(str(folder), adapters, TEXT_TO_IMAGE, base="")
    peft.save(str(folder), adapters, TEXT_TO_IMAGE, base="", force=True)
    assert peft.load(str(folder), TEXT_TO_IMAGE).config.scale == 2.0


@pytest.mark.parametrize(
    ("changes", "field", "match"),
    [
        ({"targets": ("q_proj", "c_attn")}, "lora.targets", "c_attn is no linear layer.*q_proj"),
        ({"targets": ("embed_tokens",)}, "lora.targets", "embed_tokens is no linear layer"),
        ({"targets": ("layers.0.self_attn.q_proj",)}, "lora.targets", "not the same layer of all"),
        ({"rank": 33}, "lora.rank", "33 is larger than the layer"),
        ({"targets": ()}, "targets", "empty"),
    ],
)
def test_configs_that_do_not_fit(changes, field, match):
    with pytest.raises(ConfigError, match=match) as error:
        peft.adapted(TEXT_TO_IMAGE, dataclasses.replace(LORA, **changes))
    assert error.value.field == field


def test_other_files_are_refused(folder, tmp_path):
    def refuse(match, config=TEXT_TO_IMAGE, **values):
        before = (folder / "adapter_config.json").read_text()
        edit(folder, **values)
        with pytest.raises(FileError, match=match) as error:
            peft.load(str(folder), config)
        assert "\n" not in str(error.value)
        (folder / "adapter_config.json").write_text(before)

    refuse("method 'IA3'", peft_type="IA3")
    refuse("use_dora True", use_dora=True)
    refuse("modules_to_save", modules_to_save=["lm_head"])
    refuse("rank_pattern", rank_pattern={"q_proj": 8})
    refuse("bias 'all'", bias="all")
    refuse("init_lora_weights pissa_niter_4, which changes", init_lora_weights="pissa_niter_4")
    refuse("r: Expected int", r="8")
    refuse(r"lora_A.weight has the shape \[3, .* needs \[4, ", r=4)
    text = dataclasses.replace(TEXT_TO_IMAGE.text, num_layers=3)
    deeper = dataclasses.replace(TEXT_TO_IMAGE, text=text)
    refuse(rf"3 layers.*.*missing key {QWEN}2\.mlp\.down_proj", config=deeper)
    text = dataclasses.replace(TEXT_TO_IMAGE.text, num_layers=1)
    refuse(
        rf"unknown key {QWEN}1\.mlp\.down_proj",
        config=dataclasses.replace(TEXT_TO_IMAGE, text=text),
    )
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refuse("no adapter_model.safetensors; save the adapter with safe_serialization")
    with pytest.raises(FileError, match="is no LoRA adapter"):
        peft.load(str(tmp_path), TEXT_TO_IMAGE)


def test_sampling_merges_it(folder, adapters, tmp_path, capsys):
    toy_text_to_image.save(tmp_path / "toy", TEXT_TO_IMAGE)
    plain = load(tmp_path / "toy", lora=None)
    adapted = load(tmp_path / "toy", lora=folder)
    assert not capsys.readouterr().err  # PEFT's own files do not name the base model's weights.
    layers = unstack(adapters.params)["text"]["layers_1"]["attention"]["q"]
    name = "layers_1"
    before, after = (
        model.params["model"]["text"][name]["attention"]["q"]["kernel"]
        for model in (plain, adapted)
    )
    change = 2.0 * layers["lora_a"] @ layers["lora_b"]
    np.testing.assert_allclose(after - before, change, atol=1e-4)
    for name in ("k", "v"):
        same = [
            m.params["model"]["text"]["layers_1"]["attention"][name]["kernel"]
            for m in (plain, adapted)
        ]
        np.testing.assert_array_equal(*same)
    kernel = adapted.params["model"]["head"]["groups_0"]["blocks_0"]["attention"]["qkv"]["kernel"]
    assert (
        jnp.abs(
            kernel
            - plain.params["model"]["head"]["groups_0"]["blocks_0"]["attention"]["qkv"]["kernel"]
        ).max()
        > 0.1
    )


def test_another_base_model_is_one_line(adapters, tmp_path, capsys):
    toy_text_to_image.save(tmp_path / "base", TEXT_TO_IMAGE)
    base = model_lookup.fingerprint(tmp_path / "base")
    for name, trained_on in (("same", base), ("other", "0" * 12)):
        trained = adapters._replace(base=trained_on)
        peft.save(str(tmp_path / name), trained, TEXT_TO_IMAGE, base="")
        load(tmp_path / "base", lora=tmp_path / name, lazy=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"note: the adapter {tmp_path}/other was trained on another model than {tmp_path}/base; "
        "give that as the model, or expect worse images"
    ]
