"""A small tar of tars instead of the official one."""

import io
import os
import pickle
import tarfile
import threading

import numpy as np
import pytest
from PIL import Image

from bitdance_jax.data import imagenet_tar
from bitdance_jax.data.config import DataConfig
from bitdance_jax.data.imagenet_tar import ImagenetTarSource, index_paths
from bitdance_jax.errors import UserError
from bitdance_jax.io.image_files import DamagedImage


CLASSES = {"n01443537": 9, "n01440764": 12, "n15075141": 5}  # not in order, as nothing promises


def jpeg(value):
    file = io.BytesIO()
    Image.fromarray(np.full((12, 16, 3), value, np.uint8)).save(file, "JPEG")
    return file.getvalue()


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def inner_tar(wnid, count, value):
    """Image i of the class is all value + i."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for i in range(count):
            add(tar, f"{wnid}_{i}.JPEG", jpeg(value + i))
    return file.getvalue()


@pytest.fixture(scope="module")
def tar_bytes():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number, (wnid, count) in enumerate(CLASSES.items()):
            add(tar, f"{wnid}.tar", inner_tar(wnid, count, 50 * number))
    return file.getvalue()


@pytest.fixture
def tar(tmp_path, tar_bytes):
    path = tmp_path / "train.tar"
    path.write_bytes(tar_bytes)
    return path


def values(source):
    return [round(float(source[i]["image"].mean())) for i in range(len(source))]


def test_classes_are_sorted_and_images_as_they_lie(tar):
    source = ImagenetTarSource(tar)
    assert source.class_names == ("n01440764", "n01443537", "n15075141")
    assert [source[i]["label"] for i in range(26)] == [0] * 12 + [1] * 9 + [2] * 5
    assert values(source) == [*range(50, 62), *range(9), *range(100, 105)]
    assert source[0]["image"].shape == (12, 16, 3)


def test_the_index_is_made_once(tar, monkeypatch):
    first = ImagenetTarSource(tar)
    assert sorted(file.name for file in tar.parent.iterdir()) == [
        "train.tar",
        "train.tar.index.npz",
    ]
    with np.load(index_paths(tar)[0], allow_pickle=False) as index:
        assert index["starts"].dtype == np.int64 and len(index["starts"]) == 26
    monkeypatch.setattr(imagenet_tar, "_make_index", None)
    assert values(ImagenetTarSource(tar)) == values(first)


def test_the_index_of_another_tar_or_a_damaged_one_is_replaced(tar):
    ImagenetTarSource(tar)
    path = index_paths(tar)[0]
    complete = path.read_bytes()
    for damaged in (b"", b"not an index", complete[:-30]):
        path.write_bytes(damaged)
        assert len(ImagenetTarSource(tar)) == 26 and path.read_bytes() != damaged
    with tarfile.open(tar, "w") as new:
        add(new, "birds.tar", inner_tar("birds", 3, 7))
    assert ImagenetTarSource(tar).class_names == ("birds",)
    os.utime(tar, ns=(0, 10**9))  # the same size, changed at another time
    stamp = np.load(path)["stamp"].tolist()
    ImagenetTarSource(tar)
    assert np.load(path)["stamp"].tolist() == [*stamp[:2], 10**9]


def test_beside_a_tar_that_is_read_only_the_index_goes_to_the_cache(tar, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(imagenet_tar.os, "access", lambda path, mode: False)
    source = ImagenetTarSource(tar)
    beside, cached = index_paths(tar)
    assert cached.is_file() and not beside.exists() and (tmp_path / "cache") in cached.parents
    monkeypatch.setattr(imagenet_tar, "_make_index", None)
    assert values(ImagenetTarSource(tar)) == values(source)


def test_threads_and_other_processes_read_the_same(tar):
    source = ImagenetTarSource(tar)
    expected = values(source)
    got = {}

    def read(number, source):
        got[number] = values(source)

    threads = [
        threading.Thread(target=read, args=(n, s))
        for n, s in enumerate([source, source, pickle.loads(pickle.dumps(source))])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(got.values()) == [expected] * 3


def test_a_damaged_image_is_named(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        inner = io.BytesIO()
        with tarfile.open(fileobj=inner, mode="w") as images:
            add(images, "n01440764_0.JPEG", jpeg(3)[:100])
        add(tar, "n01440764.tar", inner.getvalue())
    with pytest.raises(
        DamagedImage, match=r"cannot read the image .*train\.tar/n01440764/n01440764_0\.JPEG \("
    ):
        ImagenetTarSource(tmp_path / "train.tar")[0]


@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
def test_a_download_that_broke_off_is_one_line(tar, tar_bytes, share):
    tar.write_bytes(tar_bytes[: int(len(tar_bytes) * share)])
    with pytest.raises(UserError, match=r"train\.tar is truncated: .*; download the tar again$"):
        ImagenetTarSource(tar)
    assert not index_paths(tar)[0].exists()


@pytest.mark.parametrize("images", [0, 2])
def test_a_truncated_inner_tar_is_named(tmp_path, images):
    """Also between two images, which Python's tarfile does not notice."""
    complete = inner_tar("n01440764", 4, 0)
    member = 512 + -(-len(jpeg(0)) // 512) * 512
    for size, text in (
        (images * member, "without an end mark"),
        (images * member + 700, r"n01440764_\d\.JPEG in it has"),
    ):
        with tarfile.open(tmp_path / "train.tar", "w") as tar:
            add(tar, "n01440764.tar", complete[:size])
        with pytest.raises(
            UserError,
            match=rf"^n01440764\.tar in .*train\.tar is truncated: .*{text}",
        ):
            ImagenetTarSource(tmp_path / "train.tar")


def test_other_files_are_refused_by_name(tmp_path, tar):
    with pytest.raises(
        UserError, match=r"no tar at .*absent\.tar; use the official ILSVRC2012_img_train\.tar"
    ):
        ImagenetTarSource(tmp_path / "absent.tar")
    tar.write_bytes(jpeg(0) * 10)
    with pytest.raises(
        UserError, match=r"train\.tar is no tar or is damaged 0 bytes from its start"
    ):
        ImagenetTarSource(tar)
    with tarfile.open(tar, "w") as flat:
        add(flat, "ILSVRC2012_val_00000001.JPEG", jpeg(0))
    with pytest.raises(UserError, match="has no inner tars"):
        ImagenetTarSource(tar)
    with tarfile.open(tar, "w") as hollow:
        add(hollow, "n01440764.tar", inner_tar("n01440764", 0, 0))
    with pytest.raises(UserError, match=r"n01440764\.tar in .* is empty"):
        ImagenetTarSource(tar)


def test_files_that_are_no_images_are_skipped(tmp_path):
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as images:
        for name in ("a.JPEG", "._a.JPEG", "notes.txt", "below/b.jpg"):
            add(images, name, jpeg(3))
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        add(tar, "n01440764.tar", inner.getvalue())
    for _ in range(2):  # the second from the index
        source = ImagenetTarSource(tmp_path / "train.tar")
        assert values(source) == [3, 3] and source.skipped == {".jpeg": 1, ".txt": 1}


def test_a_negative_size_does_not_go_round_for_ever(tar, tar_bytes):
    header = bytearray(tar_bytes[:512])
    header[124:136] = (-512).to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    tar.write_bytes(header + tar_bytes[512:])
    with pytest.raises(UserError, match="is damaged 0 bytes from its start"):
        ImagenetTarSource(tar)


def test_a_image_of_gigabytes_is_not_read(tar, monkeypatch):
    monkeypatch.setattr(imagenet_tar, "MAX_IMAGE_BYTES", 100)
    with pytest.raises(DamagedImage, match="bytes"):
        ImagenetTarSource(tar)[0]


def test_as_a_data_source(tar, tmp_path):
    train, held_out = DataConfig(source="imagenet_tar", path=str(tar)).open_splits()
    assert (len(train), len(held_out)) == (25, 1) and held_out[0]["label"] == 1
    for wnid in CLASSES:
        (tmp_path / "val" / wnid).mkdir(parents=True)
        (tmp_path / "val" / wnid / "a.JPEG").write_bytes(jpeg(9))
    train, held_out = DataConfig(
        source="imagenet_tar", path=str(tar), held_out=str(tmp_path / "val")
    ).open_splits()
    assert (len(train), len(held_out)) == (26, 3) and train.class_names == held_out.class_names
