"""A small dataset prepared by TFDS itself, without TensorFlow."""

import dataclasses
import io
import pickle
import subprocess
import sys
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from bitdance_jax.data.captioned_config import open_source
from bitdance_jax.data.config import DataConfig
from bitdance_jax.data.loader import make_loader
from bitdance_jax.data.tfds import TfdsSource
from bitdance_jax.errors import UserError
from bitdance_jax.io.image_files import DamagedImage


tfds = pytest.importorskip("tensorflow_datasets")

COUNTS = {"train": 40, "validation": 6}


class SmallImages(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    # TFDS would look for them with a package that it does not require.
    url_infos: ClassVar = {}

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=["n01440764", "n01443537"]),
            "file_name": tfds.features.Text(),
            "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, download_manager):
        return {split: self._generate_examples(count) for split, count in COUNTS.items()}

    def _generate_examples(self, count):
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(np.full((8, 12, 3), 6 * i, np.uint8)).save(file, "JPEG")
            image = file.getvalue() if i != 5 else file.getvalue()[:100]
            yield (
                i,
                {
                    "image": io.BytesIO(image),
                    "label": i % 2,
                    "file_name": f"{i}.jpg",
                    "captions": [{"text": f"caption {i}"}, {"text": "another"}],
                },
            )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    SmallImages(data_dir=folder).download_and_prepare(file_format="array_record")
    return folder


def test_images_and_labels(data_dir):
    source = pickle.loads(pickle.dumps(TfdsSource("small_images", data_dir, "train")))
    assert len(source) == 40 and source.class_names == ("n01440764", "n01443537")
    damaged, values = 0, []
    for index in range(40):
        try:
            record = source[index]
        except DamagedImage as error:
            damaged += str(error).startswith(
                f"cannot read the image {index} of small_images[train] ("
            )
            continue
        assert record["image"].shape == (8, 12, 3)
        values.append(round(record["image"].mean() / 6))
        assert record["label"] == values[-1] % 2
    assert damaged == 1 and sorted(values) == [n for n in range(40) if n != 5]


def test_as_a_data_source(data_dir):
    config = DataConfig(source="tfds", dataset="small_images", path=str(data_dir))
    train, held_out = config.open_splits()
    assert (len(train), len(held_out)) == (38, 2)
    train, held_out = dataclasses.replace(config, held_out="validation").open_splits()
    assert (len(train), len(held_out)) == (40, 6)
    batch = next(make_loader(train, batch_size=40, seed=0, image_size=8))
    assert batch["image"].shape == (40, 8, 8, 3)


def test_what_cannot_be_opened_is_one_line(data_dir, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="TFDS knows no dataset 'imaginary'"):
        TfdsSource("imaginary", data_dir, "train")
    with pytest.raises(
        UserError,
        match=r"imagenet2012 is not prepared .*tfds build imagenet2012 --file_format=array_record",
    ):
        TfdsSource("imagenet2012", tmp_path, "train")
    with pytest.raises(
        UserError, match="cannot open the split 'test' of small_images: Unknown split 'test'"
    ):
        TfdsSource("small_images", data_dir, "test")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(
        UserError, match=r"needs another package: pip install 'bitdance_jax\[datasets\]'"
    ):
        TfdsSource("small_images", data_dir, "train")


def test_labels_of_imagenet_are_in_the_usual_order():
    names = tfds.builder("imagenet2012").info.features["label"].names
    assert len(names) == 1000 and names == sorted(names) and names[0] == "n01440764"


def test_tensorflow_is_not_asked_for(data_dir):
    program = f"""
import sys
from bitdance_jax.data.tfds import TfdsSource
source = TfdsSource("small_images", {str(data_dir)!r}, "validation")
print(source[0]["image"].shape, "tensorflow" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "(8, 12, 3) False\n", done.stderr


def test_captions(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    source = pickle.loads(
        pickle.dumps(open_source("tfds:small_images@validation", "captions/text"))
    )
    assert len(source) == 6
    record = source[1]
    number = round(record.image.mean() / 6)
    assert record.captions == (f"caption {number}", "another")
    assert source.captions_of(1) == record.captions
    with pytest.raises(UserError, match="has no field 'text'; it has: captions, file_name, image,"):
        open_source("tfds:small_images@validation")
