import importlib.util
import pickle

import pytest
from tar_files import image

from bitdance_jax.data.captioned_config import CaptionedDataConfig, open_source
from bitdance_jax.errors import ConfigError, FileError, UserError
from bitdance_jax.io.image_files import DamagedImage


def test_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(UserError, match=r"another package: pip install 'bitdance_jax\[parquet\]'"):
        open_source(str(tmp_path / "a.parquet"))


def table(count, start=0):
    """Images as structs of bytes and path, and captions; one caption is empty, one image damaged
    and one missing."""
    pa = pytest.importorskip("pyarrow")
    rows = range(start, start + count)
    images = [{"bytes": image(n), "path": None} for n in rows]
    if start == 0:
        images[1] = {"bytes": b"damaged", "path": None}
        images[2] = {"bytes": None, "path": None}
    return pa.table(
        {
            "id": list(rows),
            "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "text": ["" if n == 3 else f"row {n}" for n in rows],
            "alts": [[f"alt {n}", "", "other"] if n % 2 else [] for n in rows],
            "split": ["test" if n % 5 == 4 else "train" for n in rows],
        }
    )


@pytest.fixture
def parquet(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(table(6), tmp_path / "a-0.parquet", row_group_size=4)
    pq.write_table(table(5, 6), tmp_path / "a-1.parquet", row_group_size=2)
    return tmp_path


@pytest.fixture
def saved(tmp_path):
    """As `Dataset.save_to_disk` writes it."""
    pa = pytest.importorskip("pyarrow")
    folder = tmp_path / "saved" / "train"
    folder.mkdir(parents=True)
    for number, part in enumerate((table(6), table(5, 6))):
        with pa.ipc.new_stream(folder / f"data-{number}.arrow", part.schema) as writer:
            writer.write_table(part, max_chunksize=2)
    files = ", ".join(f'{{"filename": "data-{n}.arrow"}}' for n in (0, 1))
    (folder / "state.json").write_text(f'{{"_data_files": [{files}]}}')
    (folder.parent / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return folder


@pytest.fixture(params=["a-{0..1}.parquet", "", "saved"])
def path(request, parquet):
    if request.param == "saved":
        return str(request.getfixturevalue("saved"))
    return f"{parquet}/{request.param}"


def test_rows(path):
    source = pickle.loads(pickle.dumps(open_source(path, split_field="split")))
    assert len(source) == 10
    assert source.skipped.counts == {"images without a caption": 1}
    for index, row in ((0, 0), (3, 4), (5, 6), (9, 10)):
        assert source[index].captions == (f"row {row}",)
        assert source[index].image[0, 0, 0] == row
        assert source.splits[index] == ("test" if row % 5 == 4 else "train")
    for index in (1, 2):
        with pytest.raises(DamagedImage, match=f"row {index} of "):
            source[index]
    listed = open_source(path, "alts")
    assert len(listed) == 5
    assert listed[2].captions == listed.captions_of(2) == ("alt 5", "other")


def test_bad_tables(saved, parquet):
    with pytest.raises(ConfigError, match="no field 'label'; it has: alts, id, image, split, text"):
        open_source(str(saved), "label")
    with pytest.raises(ConfigError, match=r"the column 'id' of .* has int64, and captions are str"):
        open_source(str(saved), "id")
    with pytest.raises(FileError, match=r"has several splits; name one of them: .*saved/train, "):
        open_source(str(saved.parent))
    with pytest.raises(ConfigError, match=r"its values are: 0, 1"):
        config = CaptionedDataConfig(paths=(str(saved),), held_out_field="id")
        config.open_splits()
    for file in (saved / "data-1.arrow", parquet / "a-1.parquet"):
        file.write_bytes(file.read_bytes()[:300])
        path = saved if file.suffix == ".arrow" else parquet
        with pytest.raises(FileError, match=f"{file.name} is damaged"):
            open_source(str(path))
