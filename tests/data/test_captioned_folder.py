import json

import numpy as np
import pytest
from PIL import Image

from bitdance_jax.data.captioned import summary
from bitdance_jax.data.captioned_config import CaptionedDataConfig
from bitdance_jax.data.captioned_folder import CaptionedFolderSource
from bitdance_jax.errors import ConfigError, FileError, UserError
from bitdance_jax.io.image_files import DamagedImage


def save(path, colour, size=(20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), colour, np.uint8)).save(path)


@pytest.fixture
def beside(tmp_path):
    """Three captioned images at two depths, one without a caption, and a caption without one."""
    for number, name in enumerate(["a.png", "b.webp", "deep/a.png", "lonely.png"]):
        save(tmp_path / name, 10 * number)
    (tmp_path / "a.txt").write_text("A first\nline, and a second\n")
    (tmp_path / "b.txt").write_text("B")
    (tmp_path / "deep/a.txt").write_text("  \n")
    (tmp_path / "ghost.txt").write_text("nothing")
    return tmp_path


@pytest.fixture
def with_metadata(tmp_path):
    for number in range(4):
        save(tmp_path / f"train/{number}.png", number)
    rows = [
        {"file_name": "3.png", "text": ["three", " ", "drei"], "split": "test", "alt": "C"},
        {"file_name": "0.png", "text": "zero", "split": "train", "alt": "D"},
        {"file_name": "1.png", "text": "", "split": "train", "alt": "E"},
        {"file_name": "gone.png", "text": "gone", "split": "train", "alt": "F"},
    ]
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "train/metadata.jsonl").write_text(lines + "\n\n")
    return tmp_path


def test_a_text_file_beside_each_image(beside):
    source = CaptionedFolderSource(beside)
    assert len(source) == 3
    assert source[0].captions == ("A first line, and a second",)
    assert source[1].image[0, 0].tolist() == pytest.approx([10] * 3, abs=2)
    with pytest.raises(DamagedImage, match=r"deep/a.png has no caption, or an empty one"):
        source[2]
    assert summary(source) == (
        f"{beside}: 3 captioned images; skipped: images without a caption: 1"
        f" ({beside}/lonely.png); captions without an image: 1 ({beside}/ghost.txt)"
    )


def test_metadata(with_metadata):
    source = CaptionedFolderSource(with_metadata, split_field="split")
    assert [source[i].captions for i in range(2)] == [("zero",), ("three", "drei")]
    assert source[1].image[0, 0, 0] == 3
    assert source.splits == ["train", "test"]
    assert source.skipped.counts == {"images without a caption": 3, "captions without an image": 1}
    assert CaptionedFolderSource(with_metadata, "alt").captions_of(1) == ("E",)
    with pytest.raises(ConfigError, match="has no field 'label'; it has: alt, file_name, split,"):
        CaptionedFolderSource(with_metadata, "label")


def test_held_out_by_a_field(with_metadata):
    data = CaptionedDataConfig(
        paths=(str(with_metadata),),
        held_out_field="split",
        resolutions=(64,),
        resolution_weights=(),
        text_drop=0.0,
    )
    train, held_out = data.open_splits()
    samples = data.samples(train, seed=0, size_multiple=32)
    assert {samples.draw(n).caption for n in range(4)} == {"zero"}
    assert [len(source) for source in held_out] == [1]
    assert held_out[0][0].captions == ("three", "drei")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(paths=()), "data.paths must name captioned images"),
        (dict(paths=("missing",)), "no folder missing"),
        (dict(weights=(0.0,)), "weights must not all be zero"),
        (dict(weights=(1.0, 2.0)), "weights must have one number for each of 1, got 2"),
        (
            dict(resolution_weights=(1.0, 2.0)),
            "resolution_weights must have one number for each of 3",
        ),
        (dict(captions=("a", "b")), "captions must name one field, or one for each of 1 paths"),
        (dict(held_out_field="alt"), "must mark some images .* its values are: C, D"),
        (dict(), "no image is held out: there are only 2"),
    ],
)
def test_bad_configs(with_metadata, changes, message):
    with pytest.raises(UserError, match=message):
        CaptionedDataConfig(**dict(paths=(str(with_metadata),)) | changes).open_splits()


def test_no_captions(tmp_path):
    save(tmp_path / "a.png", 0)
    with pytest.raises(FileError, match=r"no captioned images: .* images without a caption: 1 "):
        CaptionedFolderSource(tmp_path)
    with pytest.raises(FileError, match=r"has no metadata.jsonl with the field 'x'"):
        CaptionedFolderSource(tmp_path, "x")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "A"}\nno json\n')
    with pytest.raises(FileError, match=r"line 2 of .*metadata.jsonl cannot be read"):
        CaptionedFolderSource(tmp_path)
