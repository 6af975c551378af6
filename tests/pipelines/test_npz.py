"""The .npz of samples: what suites read, what a kill or a full disk leaves, and the same bytes on any number of devices and hosts."""

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
import pytest
import tiny_models

from bitdance_jax import MeshConfig, UserError, load
from bitdance_jax.config import SamplerConfig, to_dict
from bitdance_jax.io.model_lookup import fingerprint
from bitdance_jax.pipelines import npz_writer
from bitdance_jax.pipelines.npz import Request, sample_to_npz
from bitdance_jax.pipelines.npz_writer import NpzWriter


pytestmark = pytest.mark.usefixtures("optimized")  # as the processes are, whose bytes are the same

ROOT = Path(__file__).parents[2]
REQUEST = {"seed": 0, "sampler": {"head_steps": 3}}
IMAGES = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), np.uint8)
LABELS = np.arange(10) % 3


def write(path, request=REQUEST, batch=3, until=10, **options):
    """Goes on from what is there. Without reaching the end it leaves everything as a kill would."""
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
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "out.npz"
    assert write(path) == 0
    return path.read_bytes()


def read_as_adm_does(path):
    """ADM's evaluator opens the member itself, and reads a version 1 header and then batches of rows."""
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


def test_numpy_and_the_evaluation_suite_read_it(path):
    write(path)
    with np.load(path) as file:
        assert file.files == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(file["arr_0"], IMAGES)
        np.testing.assert_array_equal(file["arr_1"], LABELS)
        assert file["arr_0"].dtype == np.uint8 and file["arr_1"].dtype == np.int64
    np.testing.assert_array_equal(read_as_adm_does(path), IMAGES)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert os.listdir(path.parent) == ["out.npz"]


@pytest.mark.parametrize("until", [0, 3, 9])
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(path, whole, until):
    write(path, until=until)
    assert not path.exists()
    with open(path.with_name("out.npz.partial"), "ab") as file:
        file.write(b"half a batch, not in the journal")
    assert write(path, batch=4) == until
    assert path.read_bytes() == whole


def test_killed_while_finishing(path, whole, monkeypatch):
    """All rows and a whole directory are there, and the file has not its name yet."""
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
    assert path.read_bytes() == whole


def test_a_finished_file_is_left_alone(path):
    write(path)
    before = path.stat().st_mtime_ns
    path.with_name("out.npz.partial.json").touch()  # of a kill between the file's last two steps
    assert write(path) == 10
    assert path.stat().st_mtime_ns == before
    assert os.listdir(path.parent) == ["out.npz"]


def test_a_file_of_a_version_that_had_fewer_settings(path):
    """What the file does not say was as it is by default."""
    write(path)
    assert write(path, {"seed": 0, "sampler": {"head_steps": 3, "guidance_end": 1.0}}) == 10
    with pytest.raises(UserError, match=r"guidance_end 1\.0, asked for 0\.5"):
        write(path, {"seed": 0, "sampler": {"head_steps": 3, "guidance_end": 0.5}})


@pytest.mark.parametrize("until", [6, 10])
def test_another_request_is_refused_unless_it_may_overwrite(path, whole, until):
    write(path, until=until)
    other = {"seed": 0, "sampler": {"head_steps": 4}}
    name = "out.npz" if until == 10 else "out.npz.partial"
    with pytest.raises(
        UserError,
        match=rf"{name} holds other samples \(head_steps 3, asked for 4\); choose another name or overwrite=True$",
    ):
        write(path, other)
    assert write(path, other, until=3, overwrite=True) == 0
    assert (
        (path.read_bytes() == whole) if until == 10 else not path.exists()
    )  # replaced by a finished file only
    assert write(path, other, overwrite=True) == 3
    assert path.read_bytes() != whole


def test_another_file_of_that_name_is_refused(path):
    path.parent.mkdir()
    os.mkfifo(path)  # would keep a reader for ever
    with pytest.raises(
        UserError, match=r"out\.npz is not a file, but a folder, a pipe or a device$"
    ):
        write(path)
    path.unlink()
    for save in (lambda: path.write_text("notes"), lambda: np.savez(path, arr_0=IMAGES)):
        save()
        with pytest.raises(
            UserError,
            match="exists and was not written by this command",
        ):
            write(path)
    write(path, overwrite=True)
    assert read_as_adm_does(path).shape == IMAGES.shape


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda partial, journal: os.truncate(partial, partial.stat().st_size - 1),
            "does not have the 6 images",
        ),
        (
            lambda partial, journal: flip(partial, partial.stat().st_size - 7),
            "is damaged: its 6 images are not",
        ),
        (lambda partial, journal: zero_the_end(partial), "is damaged: its 6 images are not"),
        (lambda partial, journal: change(journal, rows=3), "is damaged: its 3 images are not"),
        (
            lambda partial, journal: change(journal, checksum=5),
            "is damaged: its 6 images are not",
        ),
        (lambda partial, journal: change(journal, rows=-1), "does not have the -1 images"),
        (lambda partial, journal: change(journal, rows=11), "does not have the 11 images"),
        (
            lambda partial, journal: journal.write_text('{"request"'),
            "json cannot be read: Input data was truncated",
        ),
        (
            lambda partial, journal: journal.write_text("[]"),
            "json cannot be read: Expected object, got array",
        ),
        (
            lambda partial, journal: change(journal, rows=[3]),
            "json cannot be read: rows: Expected int, got array",
        ),
        (
            lambda partial, journal: change(journal, request=None),
            "json cannot be read: request: Expected object, got null",
        ),
    ],
)
def test_what_the_journal_does_not_vouch_for_is_not_gone_on_with(path, whole, damage, message):
    write(path, until=6)
    partial, journal = path.with_name("out.npz.partial"), path.with_name("out.npz.partial.json")
    damage(partial, journal)
    before = partial.read_bytes()
    with pytest.raises(
        UserError, match=rf"out\.npz\.partial.*{message}.*; generate it again with overwrite=True$"
    ):
        write(path)
    assert partial.read_bytes() == before
    assert write(path, overwrite=True) == 0
    assert path.read_bytes() == whole


def zero_the_end(partial):
    """As some file systems leave what had not reached the disk when the power went."""
    partial.write_bytes(partial.read_bytes()[:-60] + bytes(60))


def change(journal, **fields):
    journal.write_text(json.dumps(json.loads(journal.read_text()) | fields))


@pytest.mark.parametrize("where", ["first header", "array", "image", "labels", "directory"])
def test_a_finished_file_is_checked_when_its_command_is_repeated(path, whole, where):
    write(path)
    directory = whole.rindex(b"PK\x01\x02")
    image = whole.index(IMAGES.tobytes())
    labels = whole.index(LABELS.tobytes())
    places = {
        "first header": 31,
        "array": image - 60,
        "image": image + 99,
        "labels": labels,
        "directory": directory + 17,
    }
    flip(path, places[where])
    with pytest.raises(
        UserError, match=r"out\.npz is damaged \(.*\); generate it again with overwrite=True$"
    ):
        write(path)
    assert write(path, overwrite=True) == 0
    assert path.read_bytes() == whole


@pytest.mark.parametrize("fault", ["labels without size and checksum", "version"])
def test_a_finished_files_damaged_directory_is_one_line(path, whole, fault):
    write(path)
    data, entry = bytearray(whole), whole.rindex(b"PK\x01\x02")
    if fault == "version":
        data[entry + 6] = 226  # that is needed to read it
    else:
        data[entry + 16 : entry + 28] = bytes(12)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"out\.npz (is damaged|exists).* overwrite=True$"):
        write(path)


def test_a_second_writer_of_a_file_is_refused(path, whole):
    first = NpzWriter(path, REQUEST, IMAGES.shape)
    first.open()
    first.append(IMAGES[:3])
    with pytest.raises(
        UserError,
        match=r"^another process is writing .*out\.npz; wait for it, or give another name$",
    ):
        write(path)
    with pytest.raises(UserError, match=r"^another process is writing "):
        write(path, overwrite=True)
    first.close()
    assert write(path) == 3
    assert path.read_bytes() == whole
    assert os.listdir(path.parent) == ["out.npz"]


def test_a_journal_without_its_file_counts_for_nothing(path, whole):
    write(path, {"seed": 5}, until=6)
    path.with_name("out.npz.partial").unlink()
    assert write(path) == 0
    assert path.read_bytes() == whole


def test_the_journal_counts_a_batch_after_it_has_reached_the_disk(path, monkeypatch):
    events, replace, fsync = [], os.replace, os.fsync
    monkeypatch.setattr(
        npz_writer.os,
        "fsync",
        lambda number: events.append(("disk", os.fstat(number).st_size)) or fsync(number),
    )
    monkeypatch.setattr(
        npz_writer.os,
        "replace",
        lambda old, new: events.append(("in place", new.name)) or replace(old, new),
    )
    writer = NpzWriter(path, REQUEST, IMAGES.shape)
    writer.open()
    assert writer.append(IMAGES[:3]) == 3
    writer.close()
    journal = path.with_name("out.npz.partial.json")
    assert events == [
        ("disk", path.with_name("out.npz.partial").stat().st_size),
        ("disk", journal.stat().st_size),
        ("in place", journal.name),
    ]


def test_a_disk_that_fills_up_keeps_what_is_finished(path, whole):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (460, limits[1]))
    try:
        with pytest.raises(UserError) as caught:
            write(path, batch=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (
        str(caught.value)
        == f"cannot write {path}: File too large; 4 finished images are kept, and the same command goes on"
    )
    assert write(path, batch=2) == 4
    assert path.read_bytes() == whole


def test_too_little_room_is_said_at_once(path, monkeypatch):
    monkeypatch.setattr(
        npz_writer.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10**9)
    )
    writer = NpzWriter(path, REQUEST, (50_000, 256, 256, 3))
    with pytest.raises(
        UserError, match=r"out\.npz needs 9\.8 GB more and 1\.0 GB are free; make room there$"
    ):
        writer.open()


@pytest.mark.parametrize("name", ["samples", "samples.zip", "gs://bucket/samples.npz"])
def test_a_name_that_cannot_be(name):
    with pytest.raises(
        UserError, match=r"^the samples go into a local file that ends in \.npz, got "
    ):
        NpzWriter(name, REQUEST, IMAGES.shape)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^cannot write .*x\.npz: (File exists|Not a directory)$"):
        write(tmp_path / "file" / "x.npz")


def test_more_than_four_gigabytes(path, monkeypatch):
    """The ImageNet file's 9.8 GB, as a file with a hole, whose checksum would take long."""
    monkeypatch.setattr(NpzWriter, "_check_rows", lambda self, rows, checksum: None)
    monkeypatch.setattr(
        npz_writer.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10**12)
    )
    shape = (50_000, 256, 256, 3)
    writer = NpzWriter(path, REQUEST, shape)
    writer.open()
    writer.append(np.full((1, *shape[1:]), 7, np.uint8))
    writer.close()
    journal, partial = path.with_name("out.npz.partial.json"), path.with_name("out.npz.partial")
    journal.write_text(json.dumps(json.loads(journal.read_text()) | {"rows": 50_000}))
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
        assert set(file.read(256 * 256 * 3)) == {7} and set(file.read(1000)) == {0}
    path.unlink()


# From here on with a model, in processes of their own.

MODEL = dataclasses.replace(
    tiny_models.MODEL,
    transformer=dataclasses.replace(tiny_models.MODEL.transformer, num_layers=1),
    head=dataclasses.replace(tiny_models.MODEL.head, num_blocks=1),
)
SAMPLER = SamplerConfig(head_steps=2, guidance_scale=2.0)
COUNT, PER_DEVICE = 400, 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.save_model(
        tmp_path_factory.mktemp("models") / "model", MODEL, sampler=to_dict(SAMPLER)
    )


@pytest.fixture(scope="module")
def drawn(model):
    """The file of one device, drawn without a stop."""
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
    variables = {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": ROOT,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    variables = {name: str(value) for name, value in (variables | environment).items()}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [str(word) for word in command],
        env=os.environ | variables,
        stdout=pipe,
        stderr=pipe,
        text=True,
    )


def start_two_hosts(model, outs):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    place = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": 2}
    return [start(model, out, **place, JAX_PROCESS_ID=number) for number, out in enumerate(outs)]


def test_images_are_those_of_the_pipeline_in_balance(model, drawn):
    with np.load(drawn) as file:
        images, labels = file["arr_0"], file["arr_1"]
    np.testing.assert_array_equal(labels, np.arange(COUNT) % 9)
    expected = load(model).sample(
        labels[:12].tolist(), seed=3, batch_size=PER_DEVICE, progress=False
    )
    # Programs of different forms round differently: by a level, if a value lies at the edge of two.
    assert np.abs(images[:12].astype(int) - expected).max() <= 1
    assert len(np.unique(images, axis=0)) == COUNT


@pytest.mark.slow
def test_killed_on_four_devices_and_gone_on_with_on_two_hosts_it_is_the_file_of_one_device(
    model, drawn, tmp_path
):
    journal = tmp_path / "out.npz.partial.json"
    process = start(model, tmp_path / "out.npz", devices=4)
    while not (journal.exists() and json.loads(journal.read_text())["rows"] >= 40):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    rows = json.loads(journal.read_text())["rows"]
    assert 40 <= rows < COUNT
    assert not (tmp_path / "out.npz").exists()

    first, second = start_two_hosts(
        model, [tmp_path / "out.npz", tmp_path / "elsewhere" / "out.npz"]
    )
    (out, error), (other_out, other_error) = (
        process.communicate(timeout=120) for process in (first, second)
    )
    assert (first.returncode, second.returncode) == (0, 0), error + other_error
    assert (
        out.splitlines()[-1]
        == f"400 images of 9 labels in {tmp_path}/out.npz ({COUNT - rows} generated now)"
    )  # after Gloo's words
    assert "images" not in other_out and "sampling" not in other_error
    assert (tmp_path / "out.npz").read_bytes() == drawn.read_bytes()
    assert os.listdir(tmp_path) == ["out.npz"]


@pytest.mark.slow
def test_no_host_waits_for_one_that_cannot_write(model, drawn, tmp_path):
    shutil.copy(drawn, tmp_path / "out.npz")
    model = shutil.copytree(model, tmp_path / "other")
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    first, second = start_two_hosts(model, [tmp_path / "out.npz"] * 2)
    errors = [process.communicate(timeout=120)[1] for process in (first, second)]
    assert (first.returncode, second.returncode) == (2, 2)
    assert "holds other samples (checkpoint " in errors[0] and "Traceback" not in errors[0]
    assert (
        f"error: process 0: {tmp_path}/out.npz holds other samples" in errors[1]
        and "Traceback" not in errors[1]
    )
