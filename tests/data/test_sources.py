import pickle

import numpy as np
import pytest
from PIL import Image

from bitdance_jax.data import sources
from bitdance_jax.data.config import DataConfig
from bitdance_jax.errors import UserError
from bitdance_jax.io.image_files import DamagedImage


def write(path, value=0, shape=(4, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*shape, 3), value, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """38 images: 20 cats in two formats, 18 dogs in a folder below theirs; image i is all i."""
    for i in range(20):
        write(tmp_path / "cats" / f"{i:02d}.{'png' if i % 2 else 'BMP'}", i)
    for i in range(20, 38):
        write(tmp_path / "dogs" / "small" / f"{i:02d}.webp", i)
    (tmp_path / "cats" / "notes.txt").write_text("passed over")
    (tmp_path / ".cache").mkdir()
    return tmp_path


def test_folder_classes_labels_and_order(folder):
    source = sources.FolderSource(folder)
    assert source.class_names == ("cats", "dogs")
    assert len(source) == 38
    for i in range(38):
        record = source[i]
        assert (
            record["image"].shape == (4, 6, 3) and (abs(record["image"].astype(int) - i) <= 2).all()
        )
        assert record["label"] == (i >= 20)


def test_open_split(folder):
    config = DataConfig(source="folder", path=str(folder))
    train, held_out = config.open_split("train"), config.open_split("heldout")
    assert (len(train), len(held_out), len(config.open_split("all"))) == (36, 2, 38)
    assert train.class_names == held_out.class_names == ("cats", "dogs")
    assert (held_out[0]["label"], held_out[1]["label"]) == (0, 1)
    assert [len(source) for source in config.open_splits()] == [36, 2]


def test_held_out_images_of_their_own(folder, tmp_path):
    for name in ("cats", "dogs"):
        write(tmp_path / "other" / name / "a.png", 200)
    config = DataConfig(
        source="folder", path=str(folder / "images"), held_out=str(tmp_path / "other")
    )
    for name in ("cats", "dogs"):
        (folder / "images").mkdir(exist_ok=True)
        (folder / name).rename(folder / "images" / name)
    train, held_out = config.open_splits()
    assert (len(train), len(held_out)) == (38, 2) and held_out[1]["label"] == 1
    assert [len(config.open_split(split)) for split in ("train", "heldout", "all")] == [
        38,
        2,
        38,
    ]
    (tmp_path / "other" / "dogs").rename(tmp_path / "other" / "birds")
    with pytest.raises(
        UserError, match=r"held-out data .*other has 2 classes and the training data 2.*: birds"
    ):
        config.open_splits()


def test_the_first_line_says_what_there_is(folder):
    config = DataConfig(source="folder", path=str(folder))
    expected = "36 images in 2 classes to train on, 2 held out; other files skipped: 1 (.txt 1)"
    assert sources.summary(*config.open_splits()) == expected


def test_damaged_image_is_named_when_read(folder):
    (folder / "cats" / "00.BMP").write_bytes(b"not an image")
    source = sources.FolderSource(folder)
    with pytest.raises(DamagedImage, match=r"00\.BMP"):
        source[0]


def test_folders_that_cannot_be_used(tmp_path, folder):
    with pytest.raises(UserError, match=r"no image folder at .*absent; use a folder"):
        sources.FolderSource(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no sub-folders"):
        sources.FolderSource(tmp_path / "empty")
    (tmp_path / "hollow" / "birds").mkdir(parents=True)
    with pytest.raises(UserError, match=r"class folder .*birds holds no images"):
        sources.FolderSource(tmp_path / "hollow")
    write(tmp_path / "flat" / "a.jpg")
    with pytest.raises(UserError, match=r"a\.jpg is in no class folder"):
        sources.FolderSource(tmp_path / "flat")
    write(tmp_path / "few" / "birds" / "a.jpg")
    with pytest.raises(UserError, match=r"only 1 images, .*every 19th"):
        DataConfig(source="folder", path=str(tmp_path / "few")).open_split("heldout")


def test_a_folder_that_may_not_be_read_is_named(folder, monkeypatch):
    def scandir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(sources.os, "scandir", scandir)
    with pytest.raises(UserError, match=f"^cannot read {folder}: Permission denied$"):
        sources.FolderSource(folder)


def test_a_tree_is_listed_without_a_look_at_its_images(folder):
    (folder / "dogs" / "small" / "link.jpg").symlink_to(folder / "nowhere")
    source = sources.FolderSource(folder)
    assert len(source) == 39
    with pytest.raises(DamagedImage, match=r"link\.jpg \(.*No such file"):
        source[38]


def test_a_folder_source_passes_to_other_processes_at_once(folder):
    """No list of a million strings."""
    source = sources.FolderSource(folder)
    again = pickle.loads(pickle.dumps(source))
    assert again[37]["label"] == 1 and (again[37]["image"] == source[37]["image"]).all()
    assert not any(
        isinstance(value, list | dict) for name, value in vars(source).items() if name != "skipped"
    )


def test_array_source_gives_rows_and_refuses_ragged_arrays():
    source = sources.ArraySource(
        {"codes": np.arange(6).reshape(3, 2), "label": np.arange(3)}, ("a", "b", "c")
    )
    assert len(source) == 3
    assert source[1]["codes"].tolist() == [2, 3] and source[1]["label"] == 1
    with pytest.raises(ValueError, match="same number of rows"):
        sources.ArraySource({"codes": np.zeros(3), "label": np.zeros(2)}, ())
