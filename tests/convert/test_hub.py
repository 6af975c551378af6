"""Files downloaded for a Hugging Face id. A folder takes the place of the hub."""

import fnmatch
import shutil
import types

import golden_models
import huggingface_hub
import pytest
import safetensors.numpy

from bitdance_jax.convert import convert, hub, hub_config, sources
from bitdance_jax.errors import FileError
from bitdance_jax.io import model_folder


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder as the repository "owner/name"; downloads go to the folder `cache`."""
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


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def downloaded(folder):
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
LANGUAGE_MODEL = [
    "config.json",
    "merges.txt",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
]


@pytest.mark.parametrize(
    ("expected", "others"),
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
        (LANGUAGE_MODEL, ["readme.md", "model.gguf", "onnx/config.json"]),
    ],
)
def test_a_repository_that_is_a_folder(repository, tmp_path, expected, others):
    touch(repository, *expected, *others)
    assert hub.download("owner/name") == tmp_path / "cache"
    assert downloaded(tmp_path / "cache") == expected


@pytest.fixture
def headers(repository, monkeypatch):
    """The names of the weights of which the header alone was fetched."""
    fetched = []

    def parse(name, file):
        fetched.append(file)
        with safetensors.safe_open(repository / file, framework="np") as opened:
            tensors = {
                key: types.SimpleNamespace(shape=opened.get_slice(key).get_shape())
                for key in opened.keys()
            }
            return types.SimpleNamespace(tensors=tensors, metadata=opened.metadata() or {})

    monkeypatch.setattr(huggingface_hub, "parse_safetensors_file_metadata", parse)
    return fetched


def test_the_config_of_a_model_without_its_weights(repository, headers, tmp_path):
    repository.rmdir()
    golden_models.release_folder("t2i_4x", repository)
    expected = convert.text_to_image_config(sources.open_source(str(repository)))
    assert hub_config.read("owner/name") == expected
    weights = sorted(file.name for file in repository.glob("*.safetensors"))
    assert sorted(headers) == weights
    assert not [file for file in downloaded(tmp_path / "cache") if file in weights]


def test_the_config_of_an_incomplete_or_another_model(repository, headers):
    repository.rmdir()
    golden_models.release_folder("t2i_4x", repository)
    (repository / "ae.safetensors").unlink()
    (repository / "vision_head_config.json").unlink()
    with pytest.raises(FileError, match=r"no weights of ae, vision_head_config\.json$"):
        hub_config.read("owner/name")
    (repository / "model.safetensors.index.json").rename(repository / "other.json")
    for file in ("vision_head", "projector"):
        (repository / f"{file}.safetensors").unlink()
    with pytest.raises(FileError, match="owner/name is not a text-to-image model"):
        hub_config.read("owner/name")
    with pytest.raises(FileError, match="is a file; a text-to-image model is a whole repository"):
        hub_config.read("owner/name/B_1x.pt")
    assert not headers


def test_a_tokenizer_of_a_text_to_image_repository(repository, tmp_path):
    """If it is named, nothing else is downloaded."""
    safetensors.numpy.save_file(
        golden_models.read("tokenizer/weights"), repository / "ae.safetensors"
    )
    touch(repository, "vision_head.safetensors", "model.safetensors.index.json")
    convert.convert("owner/name/ae.safetensors", str(tmp_path / "out"))
    assert model_folder.load(tmp_path / "out").kind == "tokenizer"
    assert downloaded(tmp_path / "cache") == ["ae.safetensors"]


def test_one_of_several_files_with_its_config(repository, tmp_path):
    touch(repository, "B_1x.pt", "ae_d16c32.safetensors", "ae_d16c32_config.json", "readme.md")
    path = hub.download("owner/name/ae_d16c32.safetensors")
    assert path == tmp_path / "cache" / "ae_d16c32.safetensors"
    assert downloaded(tmp_path / "cache") == ["ae_d16c32.safetensors", "ae_d16c32_config.json"]
    with pytest.raises(FileError, match=r"owner/name: .*: B_1x\.pt, ae_d16c32\.safetensors$"):
        hub.download("owner/name")
    with pytest.raises(FileError, match=r"owner/name/L_1x\.pt: "):
        hub.download("owner/name/L_1x.pt")


def test_class_conditional_diffusers_repositories(repository, tmp_path):
    """A folder for each model; only the named one is downloaded."""
    files = ["autoencoder/config.json", "autoencoder/diffusion_pytorch_model.safetensors"]
    files += ["transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"]
    for model in ("B_1x", "L_1x"):
        touch(repository, f"{model}/model_index.json", f"{model}/pipeline.py")
        touch(repository, *(f"{model}/{file}" for file in files))
    with pytest.raises(FileError, match=r"^owner/name: .*owner/name/B_1x: B_1x, L_1x$"):
        hub.download("owner/name")
    assert hub.download("owner/name/L_1x") == tmp_path / "cache" / "L_1x"
    assert downloaded(tmp_path / "cache") == [f"L_1x/{file}" for file in files]

    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(repository / "L_1x")
    (repository / "B_1x" / "transformer").rename(repository / "transformer")
    (repository / "B_1x" / "autoencoder").rename(repository / "autoencoder")
    assert hub.download("owner/name") == tmp_path / "cache"
    assert downloaded(tmp_path / "cache") == files


def test_the_only_model_needs_no_name(repository, tmp_path):
    touch(repository, "B_1x.pt", "readme.md")
    assert hub.download("owner/name") == tmp_path / "cache" / "B_1x.pt"
    assert downloaded(tmp_path / "cache") == ["B_1x.pt"]


@pytest.mark.parametrize(
    "name", ["missing.pt", "missing/ae.safetensors", "/no/such/file", "name", "../x/y", "a b/c"]
)
def test_missing_files_are_not_searched_on_the_hub(repository, name):
    with pytest.raises(FileError, match=f"{name},"):
        hub.download(name)


def test_errors_of_the_hub_are_one_line(repository):
    with pytest.raises(FileError, match=r"owner/other, .*: no route to the hub$"):
        hub.download("owner/other")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The cache of the hub's real client after an earlier download, on a host without a network."""
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


def test_a_cached_file_needs_no_network(offline, capsys):
    touch(offline, "B_1x.pt", "ae.safetensors", "ae_config.json")
    assert hub.download("owner/name/B_1x.pt") == offline / "B_1x.pt"
    assert "Name or service not known" in capsys.readouterr().err
    with pytest.raises(FileError, match=r"owner/name/L_1x\.pt: "):
        hub.download("owner/name/L_1x.pt")
    with pytest.raises(FileError, match=r"owner/other, .*: Name or service not known$"):
        hub.download("owner/other")


def test_a_cached_model_needs_no_network(offline):
    touch(offline, *PLAIN)
    assert hub.download("owner/name") == offline
