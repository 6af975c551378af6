import numpy as np
import pytest
from PIL import Image
from tar_files import samples, write_tar

from bitdance_jax.data.captioned_config import CaptionedDataConfig
from bitdance_jax.data.config import DataConfig
from bitdance_jax.data.loader import make_loader
from bitdance_jax.data.unlabelled import UnlabelledSource, UnlabelledTarSource
from bitdance_jax.errors import ConfigError, FileError
from bitdance_jax.io.image_files import DamagedImage


@pytest.fixture
def folder(tmp_path):
    """Five images at two depths, and a file that is none."""
    root = tmp_path / "images"
    for number in range(5):
        file = root / ("deep/er" if number % 2 else "") / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 30, 3), 10 * number, np.uint8)).save(file)
    (root / "notes.txt").write_text("no image")
    return root


def test_images_at_any_depth(folder):
    source = UnlabelledSource(folder)
    assert len(source) == 5
    assert len(source.class_names) == 1
    assert source.skipped == {".txt": 1}
    assert sorted(int(source[i]["image"][0, 0, 0]) for i in range(5)) == [0, 10, 20, 30, 40]
    batch = next(make_loader(source, batch_size=4, seed=0, image_size=16))
    assert batch["image"].shape == (4, 16, 16, 3)
    assert batch["label"].tolist() == [0] * 4


def test_by_name(folder):
    data = DataConfig(source="images", path=str(folder), held_out=str(folder / "deep"))
    assert len(data.open()) == 5
    assert len(data.open_held_out()) == 2
    train, held_out = data.open_splits()
    assert (len(train), len(held_out)) == (5, 2)


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_no_images(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError) as error:
        UnlabelledSource(tmp_path / name)
    assert error.value.path == str(tmp_path / name)


def test_tar_files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_tar(tmp_path / "a-0.tar", [*samples(3), ("x.txt", "no image")])
    write_tar(tmp_path / "a-1.tar", [("deep/a.jpg", b"damaged"), ("deep/b.png", 9)])
    data = DataConfig(
        source="webdataset", path=f"{tmp_path}/a-{{0..1}}.tar", held_out=f"{tmp_path}/a-0.tar"
    )
    train, held_out = data.open_splits()
    assert (len(train), len(held_out), data.count_classes()) == (5, 3, 1)
    assert [int(train[i]["image"][0, 0, 0]) for i in (0, 1, 2, 4)] == [0, 1, 2, 9]
    assert train.skipped == {".txt": 4, ".json": 3}
    with pytest.raises(DamagedImage, match=r"a-1.tar/deep/a.jpg"):
        train[3]
    write_tar(tmp_path / "b.tar", [("x.txt", "no image")])
    with pytest.raises(FileError, match=r"b.tar contains no images; other files skipped: 1"):
        DataConfig(source="webdataset", path=f"{tmp_path}/b.tar").open()


def test_a_field_of_the_samples_holds_images_out(tmp_path, monkeypatch):
    """The same ones as in text to image."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number in range(2):
        write_tar(tmp_path / f"a-{number}.tar", samples(6, 6 * number))
    path = f"{tmp_path}/a-{{0..1}}.tar"
    data = DataConfig(source="webdataset", path=path, held_out_field="split")
    train, held_out = data.open_splits()
    numbers = [
        [int(split[i]["image"][0, 0, 0]) for i in range(len(split))] for split in (train, held_out)
    ]
    assert numbers == [[0, 1, 2, 4, 5, 6, 8, 9, 10], [3, 7, 11]]
    captioned = CaptionedDataConfig(paths=(path,), held_out_field="split").open_splits()[1][0]
    assert [captioned[i].captions[0] for i in range(3)] == ["image 3", "image 7", "image 11"]
    with pytest.raises(ConfigError, match=r"a-0.tar/00000.png's .json has no field 'part'"):
        UnlabelledTarSource(path, "part")
    with pytest.raises(ConfigError, match="held_out_field must mark some images of"):
        UnlabelledTarSource(path, "alt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "images"}, "data.source images takes no data.held_out_field"),
        ({"held_out": "b.tar"}, "exclude each other"),
    ],
)
def test_where_a_field_may_not_be_named(changes, message):
    options = {"source": "webdataset", "path": "a.tar", "held_out_field": "split"}
    with pytest.raises(ConfigError, match=message):
        DataConfig(**options | changes)
