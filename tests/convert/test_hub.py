"""What is fetched for a Hugging Face id; the hub itself is a folder here."""

import fnmatch
import shutil
import types

import golden_models
import huggingface_hub
import pytest
import safetensors.numpy

from bitdance_jax.convert import hub
from bitdance_jax.convert.convert import convert
from bitdance_jax.errors import UserError
from bitdance_jax.io import model_folder


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder that stands for the repository "owner/name"; what is downloaded lies in the folder `cache`."""
    folder = tmp_path / "hub"
    folder.mkdir()

    def files(name):
        if name != "owner/name":
            raise ConnectionError("no route to the hub\n\nCheck your connection")
        return [
            str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file()
        ]

    def snapshot(name, *, allow_patterns, local_files_only=False):
        if local_files_only:
            raise FileNotFoundError("nothing in the cache")
        for file in files(name):
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / "cache" / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(folder / file, tmp_path / "cache" / file)
        return str(tmp_path / "cache")

    def model_info(name, *, timeout):
        return types.SimpleNamespace(
            siblings=[types.SimpleNamespace(rfilename=file) for file in files(name)]
        )

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    return folder


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def fetched(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


DIFFUSERS = [
    "autoencoder/diffusion_pytorch_model.safetensors",
    "diffusion_head/config.json",
    "projector/config.json",
    "text_encoder/model-00001-of-00002.safetensors",
    "text_encoder/model.safetensors.index.json",
    "tokenizer/merges.txt",
]
PLAIN = [
    "ae_config.json",
    "chat_template.jinja",
    "config.json",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "vision_head.safetensors",
]


@pytest.mark.parametrize(
    ("wanted", "unwanted"),
    [
        (
            DIFFUSERS,
            [
                "model_index.json",
                "readme.md",
                "samples/cat.png",
                "text_encoder/model.bin",
                "ema/model.safetensors",
            ],
        ),
        (PLAIN, ["readme.md", "model.gguf", "onnx/model.safetensors"]),
    ],
)
def test_a_text_to_image_repository_is_fetched_whole(repository, tmp_path, wanted, unwanted):
    fill(repository, *wanted, *unwanted)
    assert hub.download("owner/name") == tmp_path / "cache"
    assert fetched(tmp_path / "cache") == wanted


def test_a_tokenizer_of_a_text_to_image_repository(repository, tmp_path):
    """It is fetched alone when it is named."""
    safetensors.numpy.save_file(
        golden_models.read("tokenizer/weights"), repository / "ae.safetensors"
    )
    fill(repository, "vision_head.safetensors", "model.safetensors.index.json")
    convert("owner/name/ae.safetensors", str(tmp_path / "out"))
    assert model_folder.load(tmp_path / "out").kind == "tokenizer"
    assert fetched(tmp_path / "cache") == ["ae.safetensors"]


def test_one_of_several_files_with_its_config(repository, tmp_path):
    fill(repository, "B_1x.pt", "ae_d16c32.safetensors", "ae_d16c32_config.json", "readme.md")
    assert (
        hub.download("owner/name/ae_d16c32.safetensors")
        == tmp_path / "cache" / "ae_d16c32.safetensors"
    )
    assert fetched(tmp_path / "cache") == ["ae_d16c32.safetensors", "ae_d16c32_config.json"]
    with pytest.raises(
        UserError,
        match=r"owner/name: add one of its files, such as owner/name/B_1x\.pt: B_1x\.pt, ae_d16c32\.safetensors$",
    ):
        hub.download("owner/name")
    with pytest.raises(
        UserError, match=r"owner/name/L_1x\.pt: the repository has no file L_1x\.pt"
    ):
        hub.download("owner/name/L_1x.pt")


def test_class_conditional_diffusers_repositories_are_told_so(repository):
    fill(
        repository,
        *(
            f"BitDance_B_1x/{part}/diffusion_pytorch_model.safetensors"
            for part in ("autoencoder", "transformer")
        ),
    )
    with pytest.raises(
        UserError,
        match=r"^owner/name: class-conditional models in the diffusers layout are not converted yet",
    ):
        hub.download("owner/name")


def test_the_only_model_needs_no_name(repository, tmp_path):
    fill(repository, "B_1x.pt", "readme.md")
    assert hub.download("owner/name") == tmp_path / "cache" / "B_1x.pt"
    assert fetched(tmp_path / "cache") == ["B_1x.pt"]


@pytest.mark.parametrize(
    "name", ["missing.pt", "missing/ae.safetensors", "/no/such/file", "name", "../x/y", "a b/c"]
)
def test_missing_files_are_not_looked_for_on_the_hub(repository, name):
    with pytest.raises(UserError, match=r"no file or folder .* and it is not a Hugging Face id"):
        hub.download(name)


def test_what_the_hub_says_is_one_line(repository):
    with pytest.raises(
        UserError,
        match=r"no file or folder owner/other, and it could not be downloaded from Hugging Face: no route to the hub$",
    ):
        hub.download("owner/other")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A cache of the hub's real client, on a host without a network: what an earlier download left there."""
    snapshot = tmp_path / "cache" / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def unreachable(name, *, timeout):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "model_info", unreachable)
    return snapshot


def test_what_is_in_the_cache_needs_no_network(offline, capsys):
    fill(offline, "B_1x.pt", "ae.safetensors", "ae_config.json")
    assert hub.download("owner/name/B_1x.pt") == offline / "B_1x.pt"
    assert (
        "cannot be reached (Name or service not known); the copy of owner/name in its cache is used"
        in capsys.readouterr().err
    )
    with pytest.raises(UserError, match=r"the repository has no file L_1x\.pt"):
        hub.download("owner/name/L_1x.pt")
    with pytest.raises(
        UserError,
        match=r"no file or folder owner/other, .* from Hugging Face: Name or service not known$",
    ):
        hub.download("owner/other")


def test_a_whole_model_in_the_cache_needs_no_network(offline):
    fill(offline, *PLAIN)
    assert hub.download("owner/name") == offline
