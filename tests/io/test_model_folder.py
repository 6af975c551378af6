"""Model folders: loading returns what was saved, and a damaged folder is an error of one line."""

import json
import os
import resource
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest

from bitdance_jax.errors import FileError, ResourceError
from bitdance_jax.io import manifest, model_folder, paths
from bitdance_jax.nn.stack import unstack
from bitdance_jax.perf import hardware


PARAMS = {
    "conv": {
        "kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "bias": np.ones(4, jnp.bfloat16),
    },
    "scale": np.float32([0.5, 0.25]),
}


def save(folder: Path, params: object = PARAMS, bits: int = 8, force: bool = False) -> None:
    model_folder.save(
        folder,
        kind="tokenizer",
        config={"bits": bits},
        params=params,
        metadata={"steps": 3},
        force=force,
    )


def assert_same(params: object) -> None:
    jax.tree.map(np.testing.assert_array_equal, PARAMS, params)
    assert jax.tree.map(lambda x: x.dtype, params) == jax.tree.map(lambda x: x.dtype, PARAMS)


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_round_trip(tmp_path, convert):
    save(tmp_path / "model", jax.tree.map(convert, PARAMS))
    model = model_folder.load(tmp_path / "model", expect="tokenizer", abstract=PARAMS)
    assert (model.kind, model.config, model.metadata) == ("tokenizer", {"bits": 8}, {"steps": 3})
    assert_same(model.params)
    header = json.loads((tmp_path / "model/config.json").read_text())
    assert (header["format"], header["version"]) == ("bitdance_jax", 1)


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(Path("runs/model"))
    assert_same(model_folder.load("runs/model").params)


def test_force_replaces_a_model_and_leaves_no_other_folder(tmp_path):
    save(tmp_path / "model", bits=8)
    with pytest.raises(FileError, match=r"model holds a model already.*force=True"):
        save(tmp_path / "model", bits=16)
    assert model_folder.load(tmp_path / "model").config == {"bits": 8}
    save(tmp_path / "model", bits=16, force=True)
    assert model_folder.load(tmp_path / "model").config == {"bits": 16}
    assert os.listdir(tmp_path) == ["model"]


def test_only_a_model_is_replaced(tmp_path):
    save(tmp_path / "model")
    named = {
        "thesis.tex": "mine",
        "config.json": "mine",
        "model/notes.txt": r"model holds notes\.txt",
        "model/weights/notes.txt": r"model holds weights/notes\.txt",
    }
    for name, message in named.items():
        file = (tmp_path if name.startswith("model/") else tmp_path / "mine") / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("{}")
        with pytest.raises(FileError, match=message):
            save(tmp_path / file.relative_to(tmp_path).parts[0], force=True)
        assert file.read_text() == "{}"
        file.unlink()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileError, match=str(tmp_path / "file")):
        save(tmp_path / "file", force=True)
    save(tmp_path / "mine")  # It is empty now.
    assert_same(model_folder.load(tmp_path / "mine").params)


@pytest.mark.parametrize("remote", [False, True])
def test_a_failed_save_leaves_no_partial_model(tmp_path, monkeypatch, remote):
    save(tmp_path / "model", bits=8)
    monkeypatch.setattr(paths, "is_remote", lambda path: remote)
    monkeypatch.setattr(manifest, "_crc32", lambda file: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(tmp_path / "model", bits=16, force=True)
    monkeypatch.undo()
    if remote:  # Nothing can be renamed there: the old model is gone and the new one incomplete.
        with pytest.raises(FileError, match="is incomplete"):
            model_folder.load(tmp_path / "model")
        monkeypatch.setattr(paths, "is_remote", lambda path: True)
        save(tmp_path / "model", bits=32)
        monkeypatch.undo()
    else:
        assert model_folder.load(tmp_path / "model").config == {"bits": 8}
        assert os.listdir(tmp_path) == ["model"]
        save(tmp_path / "model", bits=32, force=True)
    assert model_folder.load(tmp_path / "model").config == {"bits": 32}
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("largest", [1000, 300_000])
def test_a_full_disk(tmp_path, largest):
    """The system refuses files above a limit: all of them, or some while others are written."""
    rng = np.random.default_rng(0)
    params = {f"layer_{i}": {"kernel": rng.standard_normal((100, 100))} for i in range(8)} | {
        "large": rng.standard_normal((300, 300))
    }
    save(tmp_path / "model")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))
    try:
        with pytest.raises(FileError, match=r"^cannot write .*model: File too large$"):
            save(tmp_path / "model", params, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    time.sleep(0.2)  # for writes that would still be running
    assert os.listdir(tmp_path) == ["model"]
    assert_same(model_folder.load(tmp_path / "model").params)


def test_a_folder_is_recovered_after_a_kill_between_two_renames(tmp_path):
    """`test_atomic` kills at every step."""
    save(tmp_path / "model")
    os.rename(tmp_path / "model", tmp_path / ".model.bitdance_jax_old")
    assert_same(model_folder.load(tmp_path / "model").params)
    assert os.listdir(tmp_path) == ["model"]
    os.rename(tmp_path / "model", tmp_path / ".model.bitdance_jax_old")
    with pytest.raises(FileError, match="holds a model already"):
        save(tmp_path / "model")


def test_special_characters_in_paths(tmp_path):
    names = ["my model", "my%20model", "a#b", "a?b=c", "100%", "ä&+;:"]
    for bits, name in enumerate(names):
        save(tmp_path / name, {"kernel": np.full(3, bits)}, bits=bits)
    for bits, name in enumerate(names):
        for read_array in (None, lambda _, array: array[...]):
            model = model_folder.load(tmp_path / name, read_array=read_array)
            assert model.config == {"bits": bits}
            np.testing.assert_array_equal(model.params["kernel"], np.full(3, bits))
    (tmp_path / "a[b]").mkdir()
    with pytest.raises(FileError, match=r"a\[b\]/model"):
        save(tmp_path / "a[b]" / "model")  # Orbax would not find what it wrote.


def test_round_trip_of_a_remote_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "is_remote", lambda path: True)
    save(tmp_path / "model")
    assert_same(model_folder.load(tmp_path / "model").params)


def test_loading_on_another_number_of_devices(tmp_path):
    """Saved sharded over four devices, read by a process that has one."""
    code = f"""
import jax, numpy as np
from bitdance_jax.io import model_folder
mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
kernel = np.arange(32.0, dtype=np.float32).reshape(8, 4)
params = {{"kernel": jax.device_put(kernel, jax.NamedSharding(mesh, jax.P("x")))}}
folder = {str(tmp_path / "model")!r}
model_folder.save(folder, kind="tokenizer", config={{}}, params=params, metadata={{}})
"""
    processes.python(["-c", code], tmp_path, devices=4)
    params = model_folder.load(tmp_path / "model").params
    np.testing.assert_array_equal(params["kernel"], np.arange(32.0).reshape(8, 4))


def test_folders_of_other_content(tmp_path):
    with pytest.raises(FileError, match="absent"):
        model_folder.load(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="no config\\.json"):
        model_folder.load(tmp_path / "empty")
    for text, message in [
        ("{", "cannot be read"),
        ("[1]", "not one of bitdance_jax"),
        ('{"model_type": "qwen3"}', "not one of bitdance_jax"),
        (
            '{"format": "bitdance_jax", "version": 2, "kind": "", "config": {}, "metadata": {}}',
            "version 2",
        ),
    ]:
        (tmp_path / "empty/config.json").write_text(text)
        with pytest.raises(FileError, match=message):
            model_folder.load(tmp_path / "empty")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": []}, r"files of .*config\.json"),
        ({"files": {"weights/x": 3}}, r"files of .*config\.json"),
        ({"files": {"weights/x": [3]}}, r"files of .*config\.json"),
        ({"kind": ["tokenizer"]}, r"kind of .*config\.json"),
        ({"kind": "image"}, r"kind of .*config\.json .*'image'"),
        ({"version": [1]}, r"version \[1\]"),
    ],
)
def test_a_damaged_header(tmp_path, change, message):
    save(tmp_path / "model")
    header = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(header | change))
    with pytest.raises(FileError, match=message):
        model_folder.load(tmp_path / "model")


def test_weights_larger_than_the_memory(tmp_path, monkeypatch):
    save(tmp_path / "model")
    size = sum(
        array.nbytes for array in jax.tree.leaves(model_folder.load(tmp_path / "model").params)
    )
    monkeypatch.setattr(hardware, "host_memory", lambda: size - 1.0)
    with pytest.raises(ResourceError, match=r"weights take .* GiB"):
        model_folder.load(tmp_path / "model")
    monkeypatch.setattr(hardware, "host_memory", lambda: float(size))
    model_folder.load(tmp_path / "model")


def test_another_kind_of_model(tmp_path):
    save(tmp_path / "model")
    with pytest.raises(FileError, match=r"tokenizer, and a class-conditional model"):
        model_folder.load(tmp_path / "model", expect="class_conditional")


def test_other_shapes(tmp_path):
    save(tmp_path / "model")
    other = PARAMS | {
        "scale": jax.ShapeDtypeStruct((3,), np.float32),
        "shift": jax.ShapeDtypeStruct((2,), np.float32),
    }
    with pytest.raises(FileError, match=r"scale is \(2,\) .* \(3,\) .* 1 more"):
        model_folder.load(tmp_path / "model", abstract=other)


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damage_to_any_file_is_found(tmp_path, damage):
    save(tmp_path / "model")
    for file in sorted((tmp_path / "model/weights").rglob("*")):
        if file.is_dir():
            continue
        good = file.read_bytes()
        middle = len(good) // 2
        if damage == "missing":
            file.unlink()
        else:
            file.write_bytes(
                good[:middle]
                if damage == "truncated"
                else good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
            )
        with pytest.raises(FileError, match=f"(damaged|incomplete): .*{file.name}"):
            model_folder.load(tmp_path / "model")
        file.write_bytes(good)
    assert_same(model_folder.load(tmp_path / "model").params)


def test_weights_that_orbax_cannot_read(tmp_path):
    """A folder without checksums, for example one written by hand."""
    save(tmp_path / "model")
    header = json.loads((tmp_path / "model/config.json").read_text())
    del header["files"]
    (tmp_path / "model/config.json").write_text(json.dumps(header))
    assert_same(model_folder.load(tmp_path / "model").params)
    (tmp_path / "model/weights/manifest.ocdbt").unlink()
    with pytest.raises(FileError, match="weights cannot be read"):
        model_folder.load(tmp_path / "model")


STACKED = {
    "text": {
        "layers": {"q": {"kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4)}},
        "lm_head": {"kernel": np.ones(5)},
    }
}


def test_read_array(tmp_path):
    """Parts of stored arrays are read, for sharded arrays; None omits an array."""
    save(tmp_path / "model", STACKED)
    read = []

    def read_array(path, array):
        if "lm_head" in path:
            return None
        assert (array.shape, array.dtype) == ((2, 3, 4), np.float32)
        np.testing.assert_array_equal(
            array[1, 0:2], STACKED["text"]["layers"]["q"]["kernel"][1, :2]
        )
        np.testing.assert_array_equal(array[...], STACKED["text"]["layers"]["q"]["kernel"])
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.make_array_from_callback(
            array.shape, sharding, lambda index: read.append(index) or array[index]
        )

    params = model_folder.load(tmp_path / "model", abstract=STACKED, read_array=read_array).params
    assert len(read) == 1 and params["text"].keys() == {"layers"}
    np.testing.assert_array_equal(
        params["text"]["layers"]["q"]["kernel"], STACKED["text"]["layers"]["q"]["kernel"]
    )


def test_read_array_of_each_layer(tmp_path):
    save(tmp_path / "model", STACKED)
    params = model_folder.load(
        tmp_path / "model", read_array=lambda _, array: array[...], unrolled=True
    ).params
    jax.tree.map(np.testing.assert_array_equal, params, jax.tree.map(np.asarray, unstack(STACKED)))


def test_damage_found_while_reading(tmp_path, monkeypatch):
    """Under gs://, where the checksums are not compared first."""
    rng = np.random.default_rng(0)
    save(tmp_path / "model", {"kernel": rng.standard_normal((64, 64))})
    data = max(
        (tmp_path / "model/weights").rglob("*"),
        key=lambda file: file.stat().st_size * file.is_file(),
    )
    content = data.read_bytes()
    data.write_bytes(bytes(len(content) // 2) + content[len(content) // 2 :])
    monkeypatch.setattr(paths, "is_remote", lambda path: True)
    with pytest.raises(FileError, match="weights cannot be read"):
        model_folder.load(tmp_path / "model", read_array=lambda _, array: array[...])


@pytest.mark.parametrize("name", ["/dev/zero", "../secret", "weights/../../secret"])
def test_files_outside_the_folder_are_not_read(tmp_path, name):
    save(tmp_path / "model")
    header = json.loads((tmp_path / "model/config.json").read_text())
    header["files"] |= {name: [0, 0]}
    (tmp_path / "model/config.json").write_text(json.dumps(header))
    with pytest.raises(FileError, match=name):
        model_folder.load(tmp_path / "model")


@pytest.mark.parametrize(
    "name", ["config.json", "weights/_METADATA", "weights/new", "text_tokenizer/tokenizer.json"]
)
@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_devices_and_pipes_are_not_read(tmp_path, name, kind):
    """Reading them would never end."""
    files = {"text_tokenizer/tokenizer.json": b""}
    model_folder.save(
        tmp_path / "model", kind="text_to_image", config={}, params=PARAMS, metadata={}, files=files
    )
    file = tmp_path / "model" / name
    file.unlink(missing_ok=True)
    if kind == "device":
        file.symlink_to("/dev/zero")
    else:
        os.mkfifo(file)
    with pytest.raises(FileError, match=file.name):
        model_folder.load(tmp_path / "model")


def test_further_files_are_checked(tmp_path):
    files = {"text_tokenizer/tokenizer.json": b"{}"}
    model_folder.save(
        tmp_path / "model", kind="text_to_image", config={}, params=PARAMS, metadata={}, files=files
    )
    model_folder.load(tmp_path / "model")
    (tmp_path / "model/text_tokenizer/tokenizer.json").write_bytes(b"[]")
    with pytest.raises(FileError, match=r"damaged: .*text_tokenizer/tokenizer\.json"):
        model_folder.load(tmp_path / "model")
