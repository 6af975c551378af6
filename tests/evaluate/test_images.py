"""Images from .npz files and folders, and errors that name the file."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest

from bitdance_jax.data.sources import FolderSource
from bitdance_jax.data.transforms import centre_crop
from bitdance_jax.errors import FileError, UserError
from bitdance_jax.evaluate.images import ArrayImages, FolderImages, NpzImages, open_images
from bitdance_jax.io import image_files


def some_images(count=7, height=6, width=8):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("batch", [1, 3, 7, 20])
def test_npz(tmp_path, save, batch):
    array = some_images()
    save(tmp_path / "s.npz", array, arr_1=np.arange(7))
    images = open_images(tmp_path / "s.npz")
    assert (len(images), images.size) == (7, (6, 8))
    for _ in range(2):
        batches = list(images.batches(batch))
        np.testing.assert_array_equal(np.concatenate(batches), array)
    assert [len(b) for b in batches] == [len(b) for b in ArrayImages(array).batches(batch)]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_is_read_in_batches(tmp_path, save):
    save(tmp_path / "s.npz", np.zeros((400, 64, 64, 3), np.uint8))  # 4.9 MB
    tracemalloc.start()
    for _ in NpzImages(tmp_path / "s.npz").batches(10):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"mu": np.zeros(3)}, "it has: mu"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.float32)}, r"float32 \[2, 4, 4, 3\]"),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, r"uint8 \[2, 3, 4, 4\]"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, r"uint8 \[0, 4, 4, 3\]"),
        ({"arr_0": np.zeros((4, 4, 3), np.uint8)}, r"uint8 \[4, 4, 3\]"),
        ({"arr_0": np.asfortranarray(some_images())}, "Fortran order"),
    ],
)
def test_npz_with_other_arrays(tmp_path, arrays, named):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(FileError, match=f"arr_0.*{named}"):
        NpzImages(tmp_path / "s.npz")


def test_files_that_are_no_npz(tmp_path):
    with pytest.raises(FileError, match="no file"):
        open_images(tmp_path / "s.npz")
    (tmp_path / "s.npz").write_text("not a zip file")
    with pytest.raises(FileError, match=r"cannot be read as an .npz"):
        open_images(tmp_path / "s.npz")
    with zipfile.ZipFile(tmp_path / "t.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"nothing of numpy's")
    with pytest.raises(FileError, match=r"arr_0 of .* is damaged"):
        open_images(tmp_path / "t.npz")


def test_npz_damaged_inside(tmp_path):
    path = tmp_path / "s.npz"
    np.savez(path, some_images())
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)
    with pytest.raises(FileError, match="is damaged"):
        list(NpzImages(path).batches(3))


@pytest.mark.parametrize("part", ["name", "magic", "size"])
def test_npz_with_a_damaged_directory(tmp_path, part):
    np.savez(tmp_path / "s.npz", some_images())
    data = (tmp_path / "s.npz").read_bytes()
    start, central = data.index(b"PK\x03\x04"), data.index(b"PK\x01\x02")
    at, value = {
        "name": (start + 30, b"\xff"),
        "magic": (start, b"XX"),
        "size": (central + 42, b"\xff\xff\xff\x7f"),
    }[part]
    (tmp_path / "s.npz").write_bytes(data[:at] + value + data[at + len(value) :])
    with pytest.raises(FileError, match=r"s\.npz (is damaged|cannot be read)"):
        NpzImages(tmp_path / "s.npz")


def test_npz_that_is_truncated_inside(tmp_path):
    """The header is of more images than the file has."""
    np.save(tmp_path / "a.npy", some_images())
    with zipfile.ZipFile(tmp_path / "s.npz", "w") as archive:
        archive.writestr("arr_0.npy", (tmp_path / "a.npy").read_bytes()[:-5])
    with pytest.raises(FileError, match=r"arr_0 .*truncated"):
        list(NpzImages(tmp_path / "s.npz").batches(3))


def test_npz_of_another_size(tmp_path):
    np.savez(tmp_path / "s.npz", some_images())
    with pytest.raises(FileError, match=r"6 x 6.* 6 x 8"):
        open_images(tmp_path / "s.npz", 6)


def save_folder(folder, images):
    for i, image in enumerate(images):
        image_files.save_png(folder / f"class {i % 2}" / f"{i}.png", image)
    (folder / "class 0" / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_text("nor this")
    return folder


def test_folder(tmp_path):
    array = some_images()
    images = open_images(save_folder(tmp_path, array))
    assert (len(images), images.size) == (7, (6, 8))
    batches = list(images.batches(3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(batches), array[[0, 2, 4, 6, 1, 3, 5]])


def test_folder_cropped(tmp_path):
    array = [*some_images(2, 12, 8), *some_images(1, 5, 9)]
    images = FolderImages(save_folder(tmp_path, array), crop=6)
    assert images.size == (6, 6)
    expected = [centre_crop(array[i], 6) for i in (0, 2, 1)]
    np.testing.assert_array_equal(np.concatenate(list(images.batches(2))), expected)


def test_folder_of_several_sizes(tmp_path):
    images = FolderImages(save_folder(tmp_path, [*some_images(3), *some_images(1, 8, 8)]))
    with pytest.raises(FileError, match=r"3\.png is 8 x 8.* 6 x 8"):
        list(images.batches(2))


def test_folder_without_images(tmp_path):
    (tmp_path / "photo.heic").touch()
    with pytest.raises(FileError, match=r"no images .*\.heic 1"):
        FolderImages(tmp_path)
    with pytest.raises(FileError, match="no image folder"):
        FolderImages(tmp_path / "nowhere")


@pytest.mark.parametrize("crop", [None, 6])
@pytest.mark.parametrize("damaged", [0, 3, 6])
def test_a_damaged_image_is_left_out(tmp_path, capfd, crop, damaged):
    array = some_images()
    order = [0, 2, 4, 6, 1, 3, 5]
    folder = save_folder(tmp_path, array)
    (folder / f"class {order[damaged] % 2}" / f"{order[damaged]}.png").write_text("damaged")
    images = FolderImages(folder, crop)
    for _ in range(2):
        batches = list(images.batches(2))
        assert [len(batch) for batch in batches] == [2, 2, 2]
    kept = array[[number for number in order if number != order[damaged]]]
    np.testing.assert_array_equal(
        np.concatenate(batches), [centre_crop(p, 6) if crop else p for p in kept]
    )
    assert list(images.damaged.values()) == [2]
    assert capfd.readouterr().err.count("warning: cannot read the image") == 1


def test_nothing_but_damaged_images(tmp_path):
    for number in range(150):
        (tmp_path / f"{number}.png").write_text("damaged")
    with pytest.raises(FileError, match="none of the 150 images"):
        FolderImages(tmp_path)
    with pytest.raises(UserError, match="101 of the last 101 images could not be read"):
        list(FolderImages(tmp_path, 6).batches(2))
    for number in range(100):
        (tmp_path / f"{number}.png").unlink()
    with pytest.raises(FileError, match="none of the 50 images in"):
        list(FolderImages(tmp_path, 6).batches(2))


def test_training_and_evaluation_see_the_same_images(tmp_path):
    for name in (
        "cats/a.png",
        "cats/deep/b.GIF",
        "cats/.trash/c.png",
        "cats/.d.png",
        "elsewhere/e.tiff",
        "cats/notes.txt",
    ):
        image_files.save_png(tmp_path / name, np.zeros((2, 2, 3), np.uint8))
    (tmp_path / "train").mkdir()
    (tmp_path / "cats").rename(tmp_path / "train" / "cats")
    (tmp_path / "train" / "cats" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "cats" / "circle").symlink_to(tmp_path / "train" / "cats")
    (tmp_path / "train" / "cats" / "f.png").symlink_to(tmp_path / "elsewhere" / "e.tiff")
    images, source = FolderImages(tmp_path / "train"), FolderSource(tmp_path / "train")
    assert len(source) == len(images) == len(next(images.batches(9))) == 4
    assert source.skipped == images.skipped == {".txt": 1}


@pytest.mark.parametrize("shape", [(-5, 4, 4, 3), (10**12, 4, 4, 3), (2, 10**6, 10**6, 3)])
def test_npz_with_an_impossible_shape(tmp_path, shape):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    with zipfile.ZipFile(tmp_path / "s.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(96))
    with pytest.raises(FileError):
        NpzImages(tmp_path / "s.npz")
