"""The .npz of samples: its format, kills, full disks, and equal bytes on any devices and hosts."""

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import processes
import pytest
import tiny_models
from same_images import assert_same_images

from bitdance_jax import MeshConfig, UserError, load
from bitdance_jax.config import SamplerConfig, to_dict
from bitdance_jax.errors import ConfigError, FileError, ResourceError
from bitdance_jax.io.model_lookup import fingerprint
from bitdance_jax.pipelines import npz_writer
from bitdance_jax.pipelines.npz import Request, sample_to_npz
from bitdance_jax.pipelines.npz_writer import NpzWriter


ROOT = Path(__file__).parents[2]
REQUEST = {"seed": 0, "sampler": {"head_steps": 3}}
IMAGES = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), np.uint8)
LABELS = np.arange(10) % 3


def write(path, request=REQUEST, batch=3, until=10, **options):
    """Starts or resumes a file. Before the end, it leaves the state of a kill."""
    with contextlib.closing(NpzWriter(path, request, IMAGES.shape)) as writer:
        start = writer.open(**options)
        for row in range(start, until, batch):
            writer.append(IMAGES[row : min(row + batch, until)])
        if until == 10:
            writer.finish(LABELS)
    return start


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "out.npz"


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """The bytes of the complete file."""
    path = tmp_path_factory.mktemp("complete") / "out.npz"
    assert write(path) == 0
    return path.read_bytes()


def read_like_adm(path):
    """Like ADM's evaluator: reads a version 1 header and then batches of rows."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        assert not fortran
        rows = [
            np.frombuffer(file.read(shape[1] * shape[2] * shape[3]), dtype).reshape(shape[1:])
            for _ in range(shape[0])
        ]
        assert file.read() == b""
    return np.stack(rows)


def test_format(path):
    write(path)
    with np.load(path) as file:
        assert file.files == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(file["arr_0"], IMAGES)
        np.testing.assert_array_equal(file["arr_1"], LABELS)
        assert file["arr_0"].dtype == np.uint8 and file["arr_1"].dtype == np.int64
    np.testing.assert_array_equal(read_like_adm(path), IMAGES)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert os.listdir(path.parent) == ["out.npz"]


@pytest.mark.parametrize("until", [0, 3, 9])
def test_resuming_gives_the_same_bytes(path, complete, until):
    write(path, until=until)
    assert not path.exists()
    with open(path.with_name("out.npz.partial"), "ab") as file:
        file.write(b"half a batch, not in the record")
    assert write(path, batch=4) == until
    assert path.read_bytes() == complete


def test_killed_while_finishing(path, complete, monkeypatch):
    """All rows and the directory are written, but the file is not renamed yet."""
    monkeypatch.setattr(
        npz_writer.os,
        "replace",
        lambda old, new: os.rename(old, new) if new.suffix == ".json" else sys.exit("killed"),
    )
    with pytest.raises(SystemExit):
        write(path)
    monkeypatch.undo()
    assert not path.exists()
    assert write(path) == 10
    assert path.read_bytes() == complete


def test_a_finished_file_does_not_change(path):
    write(path)
    before = path.stat().st_mtime_ns
    path.with_name("out.npz.partial.json").touch()  # a kill between the last two steps
    assert write(path) == 10
    assert path.stat().st_mtime_ns == before
    assert os.listdir(path.parent) == ["out.npz"]


def test_a_file_of_an_earlier_version(path):
    """Settings that it does not have are the defaults."""
    write(path)
    assert write(path, {"seed": 0, "sampler": {"head_steps": 3, "guidance_end": 1.0}}) == 10
    with pytest.raises(UserError, match=r"guidance_end 1\.0, .*0\.5"):
        write(path, {"seed": 0, "sampler": {"head_steps": 3, "guidance_end": 0.5}})


@pytest.mark.parametrize("until", [6, 10])
def test_another_request_needs_overwrite(path, complete, until):
    write(path, until=until)
    other = {"seed": 0, "sampler": {"head_steps": 4}}
    name = "out.npz" if until == 10 else "out.npz.partial"
    with pytest.raises(FileError, match=rf"{name} .*head_steps 3, .* 4.*overwrite=True$"):
        write(path, other)
    assert write(path, other, until=3, overwrite=True) == 0
    # It is replaced only by a finished file.
    assert (path.read_bytes() == complete) if until == 10 else not path.exists()
    assert write(path, other, overwrite=True) == 3
    assert path.read_bytes() != complete


def test_another_kind_of_file_is_refused(path):
    path.parent.mkdir()
    os.mkfifo(path)  # Reading it would never end.
    with pytest.raises(FileError, match=r"out\.npz.* pipe"):
        write(path)
    path.unlink()
    for save in (lambda: path.write_text("notes"), lambda: np.savez(path, arr_0=IMAGES)):
        save()
        with pytest.raises(FileError, match="not written by this command"):
            write(path)
    write(path, overwrite=True)
    assert read_like_adm(path).shape == IMAGES.shape


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda partial, record: os.truncate(partial, partial.stat().st_size - 1),
            " 6 images",
        ),
        (
            lambda partial, record: flip(partial, partial.stat().st_size - 7),
            "damaged.* 6 images",
        ),
        (lambda partial, record: zero_the_end(partial), "damaged.* 6 images"),
        (lambda partial, record: change(record, rows=3), "damaged.* 3 images"),
        (
            lambda partial, record: change(record, checksum=5),
            "damaged.* 6 images",
        ),
        (lambda partial, record: change(record, rows=-1), " -1 images"),
        (lambda partial, record: change(record, rows=11), " 11 images"),
        (
            lambda partial, record: record.write_text('{"request"'),
            "json .*truncated",
        ),
        (
            lambda partial, record: record.write_text("[]"),
            "json .*array",
        ),
        (
            lambda partial, record: change(record, rows=[3]),
            "json .*rows: ",
        ),
        (
            lambda partial, record: change(record, request=None),
            "json .*request: ",
        ),
    ],
)
def test_a_damaged_partial_file_is_not_resumed(path, complete, damage, message):
    write(path, until=6)
    partial = path.with_name("out.npz.partial")
    damage(partial, path.with_name("out.npz.partial.json"))
    before = partial.read_bytes()
    with pytest.raises(FileError, match=rf"out\.npz\.partial.*{message}.*overwrite=True$"):
        write(path)
    assert partial.read_bytes() == before
    assert write(path, overwrite=True) == 0
    assert path.read_bytes() == complete


def zero_the_end(partial):
    """What some file systems leave after a loss of power."""
    partial.write_bytes(partial.read_bytes()[:-60] + bytes(60))


def change(record, **fields):
    record.write_text(json.dumps(json.loads(record.read_text()) | fields))


@pytest.mark.parametrize("where", ["first header", "array", "image", "labels", "directory"])
def test_a_damaged_finished_file(path, complete, where):
    write(path)
    directory = complete.rindex(b"PK\x01\x02")
    image = complete.index(IMAGES.tobytes())
    labels = complete.index(LABELS.tobytes())
    positions = {
        "first header": 31,
        "array": image - 60,
        "image": image + 99,
        "labels": labels,
        "directory": directory + 17,
    }
    flip(path, positions[where])
    with pytest.raises(FileError, match=r"out\.npz is damaged .*overwrite=True$"):
        write(path)
    assert write(path, overwrite=True) == 0
    assert path.read_bytes() == complete


@pytest.mark.parametrize("fault", ["labels without size and checksum", "version"])
def test_a_damaged_directory_of_a_finished_file(path, complete, fault):
    write(path)
    data = bytearray(complete)
    entry = complete.rindex(b"PK\x01\x02")
    if fault == "version":
        data[entry + 6] = 226  # the version needed to read it
    else:
        data[entry + 16 : entry + 28] = bytes(12)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"out\.npz (is damaged|exists).* overwrite=True$"):
        write(path)


def test_a_second_writer_is_refused(path, complete):
    first = NpzWriter(path, REQUEST, IMAGES.shape)
    first.open()
    first.append(IMAGES[:3])
    for overwrite in (False, True):
        with pytest.raises(FileError, match=r"another process .*out\.npz"):
            write(path, overwrite=overwrite)
    first.close()
    assert write(path) == 3
    assert path.read_bytes() == complete
    assert os.listdir(path.parent) == ["out.npz"]


def test_a_record_without_its_file_is_ignored(path, complete):
    write(path, {"seed": 5}, until=6)
    path.with_name("out.npz.partial").unlink()
    assert write(path) == 0
    assert path.read_bytes() == complete


def test_a_batch_is_recorded_after_it_has_reached_the_disk(path, monkeypatch):
    events = []
    replace = os.replace
    fsync = os.fsync
    monkeypatch.setattr(
        npz_writer.os,
        "fsync",
        lambda number: events.append(("disk", os.fstat(number).st_size)) or fsync(number),
    )
    monkeypatch.setattr(
        npz_writer.os,
        "replace",
        lambda old, new: events.append(("renamed", new.name)) or replace(old, new),
    )
    writer = NpzWriter(path, REQUEST, IMAGES.shape)
    writer.open()
    assert writer.append(IMAGES[:3]) == 3
    writer.close()
    record = path.with_name("out.npz.partial.json")
    assert events == [
        ("disk", path.with_name("out.npz.partial").stat().st_size),
        ("disk", record.stat().st_size),
        ("renamed", record.name),
    ]


def test_resuming_after_a_full_disk(path, complete):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (460, limits[1]))
    try:
        with pytest.raises(UserError) as caught:
            write(path, batch=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = f"cannot write {path}: File too large; the same command resumes after 4 images"
    assert str(caught.value) == message
    assert write(path, batch=2) == 4
    assert path.read_bytes() == complete


def test_too_little_space(path, monkeypatch):
    monkeypatch.setattr(
        npz_writer.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10**9)
    )
    writer = NpzWriter(path, REQUEST, (50_000, 256, 256, 3))
    with pytest.raises(ResourceError, match=r"out\.npz .*9\.8 GB .*1\.0 GB"):
        writer.open()


@pytest.mark.parametrize("name", ["samples", "samples.zip", "gs://bucket/samples.npz"])
def test_other_names_are_refused(name):
    with pytest.raises(ConfigError, match=rf"\.npz.* {name}"):
        NpzWriter(name, REQUEST, IMAGES.shape)


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"x\.npz: (File exists|Not a directory)$"):
        write(tmp_path / "file" / "x.npz")


def test_more_than_four_gigabytes(path, monkeypatch):
    """Like the 9.8 GB of ImageNet samples, but with a hole, and without the slow checksum."""
    monkeypatch.setattr(NpzWriter, "_check_rows", lambda self, rows, checksum: None)
    monkeypatch.setattr(
        npz_writer.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10**12)
    )
    shape = (50_000, 256, 256, 3)
    writer = NpzWriter(path, REQUEST, shape)
    writer.open()
    writer.append(np.full((1, *shape[1:]), 7, np.uint8))
    writer.close()
    record = path.with_name("out.npz.partial.json")
    partial = path.with_name("out.npz.partial")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"rows": 50_000}))
    os.truncate(partial, partial.stat().st_size + 49_999 * 256 * 256 * 3)
    writer = NpzWriter(path, REQUEST, shape)
    assert writer.open() == 50_000
    writer.finish(np.arange(50_000) % 1000)
    writer.close()
    with np.load(path) as file:
        assert (np.bincount(file["arr_1"]) == 50).all()
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        assert archive.getinfo("arr_0.npy").file_size == 50_000 * 256 * 256 * 3 + 128
        assert np.lib.format.read_magic(file) == (1, 0)
        assert np.lib.format.read_array_header_1_0(file)[0] == shape
        assert set(file.read(256 * 256 * 3)) == {7}
        assert set(file.read(1000)) == {0}
    path.unlink()


# The following tests run a model in processes.

MODEL = dataclasses.replace(
    tiny_models.MODEL,
    transformer=dataclasses.replace(tiny_models.MODEL.transformer, num_layers=1),
    head=dataclasses.replace(tiny_models.MODEL.head, num_blocks=1),
)
SAMPLER = SamplerConfig(head_steps=2, guidance_scale=2.0)
COUNT = 400
PER_DEVICE = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.save_model(
        tmp_path_factory.mktemp("models") / "model", MODEL, sampler=to_dict(SAMPLER)
    )


@pytest.fixture(scope="module")
def expected_file(model):
    """The file of one device without interruption."""
    path = model.parent / "one.npz"
    request = Request(fingerprint(model), "float32", COUNT, seed=3, sampler=SAMPLER)
    assert (
        sample_to_npz(
            path,
            load(model, mesh=MeshConfig(data=-1)),
            request,
            per_device=PER_DEVICE,
            progress=False,
        )
        == COUNT
    )
    return path


def start(model, out, devices=1, **environment):
    flags = [
        "--checkpoint",
        model,
        "--npz",
        out,
        "--num-images",
        COUNT,
        "--seed",
        3,
        "--batch-size",
        PER_DEVICE,
    ]
    command = [
        sys.executable,
        ROOT / "sample.py",
        *flags,
        *(["--multi-host"] if environment else []),
    ]
    variables = {name: str(value) for name, value in environment.items()}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [str(word) for word in command],
        env=processes.environment(devices) | variables,
        stdout=pipe,
        stderr=pipe,
        text=True,
    )


def start_two_hosts(model, outs):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    job = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": 2}
    return [start(model, out, **job, JAX_PROCESS_ID=number) for number, out in enumerate(outs)]


def test_images_are_those_of_the_pipeline(model, expected_file):
    with np.load(expected_file) as file:
        images = file["arr_0"]
        labels = file["arr_1"]
    np.testing.assert_array_equal(labels, np.arange(COUNT) % 9)
    expected = load(model).sample(
        labels[:12].tolist(), seed=3, batch_size=PER_DEVICE, progress=False
    )
    assert_same_images(images[:12], expected)
    assert len(np.unique(images, axis=0)) == COUNT


@pytest.mark.slow
def test_a_file_of_four_devices_that_two_hosts_resume_equals_that_of_one_device(
    model, expected_file, tmp_path
):
    record = tmp_path / "out.npz.partial.json"
    process = start(model, tmp_path / "out.npz", devices=4)
    while not (record.exists() and json.loads(record.read_text())["rows"] >= 40):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    rows = json.loads(record.read_text())["rows"]
    assert 40 <= rows < COUNT
    assert not (tmp_path / "out.npz").exists()

    first, second = start_two_hosts(
        model, [tmp_path / "out.npz", tmp_path / "elsewhere" / "out.npz"]
    )
    (out, error), (other_out, other_error) = (
        process.communicate(timeout=120) for process in (first, second)
    )
    assert (first.returncode, second.returncode) == (0, 0), error + other_error
    # Gloo prints lines before it.
    last = out.splitlines()[-1]
    assert last == f"400 images of 9 labels in {tmp_path}/out.npz ({COUNT - rows} generated now)"
    assert "images" not in other_out
    assert "sampling" not in other_error
    assert (tmp_path / "out.npz").read_bytes() == expected_file.read_bytes()
    assert os.listdir(tmp_path) == ["out.npz"]


@pytest.mark.slow
def test_no_host_waits_for_one_that_cannot_write(model, expected_file, tmp_path):
    shutil.copy(expected_file, tmp_path / "out.npz")
    model = shutil.copytree(model, tmp_path / "other")
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    first, second = start_two_hosts(model, [tmp_path / "out.npz"] * 2)
    errors = [process.communicate(timeout=120)[1] for process in (first, second)]
    assert (first.returncode, second.returncode) == (2, 2)
    for error in errors:
        assert f"{tmp_path}/out.npz holds other samples (checkpoint " in error
        assert "Traceback" not in error
