"""Files of tokens: written, resumed after a kill, read back, and refused where they are not what a
model needs."""

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_models
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from bitdance_jax.config import AugmentConfig, ConfigError
from bitdance_jax.data import token_writer, transforms
from bitdance_jax.data.config import DataConfig
from bitdance_jax.data.loader import make_loader
from bitdance_jax.data.sources import ArraySource
from bitdance_jax.data.token_shards import Seal
from bitdance_jax.data.token_writer import describe, prepare, tokenize
from bitdance_jax.data.tokens import (
    Manifest,
    TokensSource,
    Versions,
    check_tokens,
    encoder_fingerprint,
)
from bitdance_jax.errors import UserError
from bitdance_jax.io.image_files import DamagedImage
from bitdance_jax.pipelines.tokenizer import Tokenizer


SIZE, COUNT = 8, 23
PARAMS = tiny_models.tokenizer_params()


@pytest.fixture(scope="module")
def source():
    rng = np.random.default_rng(0)
    arrays = {
        "image": rng.integers(0, 256, (COUNT, 10, 12, 3), np.uint8),
        "label": np.arange(COUNT, dtype=np.int32) % 3,
    }
    return ArraySource(arrays, ("a", "b", "c"))


@pytest.fixture(scope="module")
def encode():
    tokenizer = Tokenizer(tiny_models.TOKENIZER, PARAMS)
    return lambda images: np.packbits(tokenizer.encode(np.stack(images)) > 0, axis=-1)


def write(folder, source, versions=Versions(), batch_size=3, **options):
    manifest = describe(
        source, tiny_models.TOKENIZER, PARAMS, image_size=SIZE, versions=versions, shard_size=5
    )
    prepare(folder, manifest)
    return tokenize(
        source, PARAMS, folder=folder, manifest=manifest, batch_size=batch_size, **options
    )


def records(folder):
    source = TokensSource(folder)
    return [source[i] for i in range(len(source))]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, source):
    folder = tmp_path_factory.mktemp("tokens")
    assert write(folder, source) == COUNT
    return folder


def shards(folder):
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".array_record"
    }


def test_records_are_the_tokens_of_the_images_in_order(tokens, source, encode):
    read = records(tokens)
    assert [record["label"] for record in read] == source.arrays["label"].tolist()
    crops = [transforms.centre_crop(image, SIZE) for image in source.arrays["image"]]
    np.testing.assert_array_equal([record["codes"] for record in read], encode(crops))
    assert read[0].keys() == {"codes", "label"} and read[0]["codes"].shape == (4, 4, 1)


def test_the_files_are_shards_and_a_manifest(tokens):
    names = sorted(path.name for path in tokens.iterdir())
    assert names == ["manifest.json", *(f"tokens-0000{n}-of-00005.array_record" for n in range(5))]
    manifest = json.loads((tokens / "manifest.json").read_text())
    assert (
        manifest["records"] == COUNT
        and manifest["image_size"] == SIZE
        and manifest["class_names"] == ["a", "b", "c"]
    )
    assert manifest["fingerprint"] == encoder_fingerprint(tiny_models.TOKENIZER, PARAMS)
    assert manifest["tokenizer"]["bits"] == 8 and manifest["versions"]["crops"] == 0


def test_mirror_images(tmp_path, source, encode):
    write(tmp_path, source, Versions(flips=True))
    crops = [transforms.centre_crop(image, SIZE) for image in source.arrays["image"]]
    read = records(tmp_path)
    np.testing.assert_array_equal([record["codes"] for record in read], encode(crops))
    np.testing.assert_array_equal(
        [record["codes_flipped"] for record in read], encode([crop[:, ::-1] for crop in crops])
    )


@pytest.mark.parametrize("flips", [False, True])
def test_random_crops_are_those_the_loader_shows(tmp_path, source, encode, flips):
    augment = AugmentConfig(min_crop=0.6, flip=0.5)
    write(tmp_path, source, Versions(flips=flips, crops=2, augment=augment, seed=7))
    read = records(tmp_path)
    assert read[0]["codes_crops"].shape == (2, 4, 4, 1)
    for index, record in enumerate(read):
        image = source.arrays["image"][index]
        versions = [
            transforms.augment(image, SIZE, augment, rng=np.random.default_rng((7, version, index)))
            for version in range(2)
        ]
        np.testing.assert_array_equal(record["codes_crops"], encode(versions))
        centre = transforms.centre_crop(image, SIZE)
        np.testing.assert_array_equal(record["codes"], encode([centre])[0])
        if flips:
            np.testing.assert_array_equal(record["codes_flipped"], encode([centre[:, ::-1]])[0])
    (batch,) = list(
        make_loader(
            TokensSource(tmp_path),
            batch_size=COUNT,
            seed=0,
            augment=augment,
            shuffle=False,
            repeat=False,
        )
    )
    chosen = {
        tuple((batch["codes"][i] == crop).all() for crop in read[i]["codes_crops"])
        for i in range(COUNT)
    }
    assert {(True, False), (False, True)} <= chosen <= {(True, False), (False, True), (True, True)}


@pytest.mark.parametrize("batch_size", [1, 64])
def test_batch_sizes_and_damaged_images(tmp_path, source, tokens, batch_size):
    class Damaged(ArraySource):
        def __getitem__(self, index):
            if index in (4, 22):
                raise DamagedImage(f"cannot read the image {index}")
            return super().__getitem__(index)

    assert write(tmp_path / "fine", source, batch_size=batch_size) == COUNT
    assert shards(tmp_path / "fine") == shards(tokens)
    write(tmp_path / "damaged", Damaged(source.arrays, source.class_names), batch_size=batch_size)
    good, expected = records(tmp_path / "damaged"), records(tokens)
    expected[4], expected[22] = expected[5], expected[0]
    for a, b in zip(good, expected, strict=True):
        assert a["label"] == b["label"] and (a["codes"] == b["codes"]).all()


def test_a_killed_command_resumes_after_the_last_complete_shard(
    tmp_path, source, tokens, monkeypatch
):
    class Killed(BaseException):
        pass

    class Dying(ArraySource):
        def __getitem__(self, index):
            if index == 17:
                raise Killed
            return super().__getitem__(index)

    with pytest.raises(Killed):
        write(tmp_path, Dying(source.arrays, source.class_names), batch_size=1)
    left = sorted(shards(tmp_path))
    assert 1 <= len(left) <= 3 and left == sorted(shards(tokens))[: len(left)]
    (tmp_path / left[0]).write_bytes(shards(tokens)[left[0]][:-100])
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in left[1:]}
    assert write(tmp_path, source) == COUNT - 5 * (len(left) - 1)
    assert shards(tmp_path) == shards(tokens)
    assert times == {name: (tmp_path / name).stat().st_mtime_ns for name in left[1:]}
    assert not list(tmp_path.glob(".*"))
    assert write(tmp_path, source) == 0


def test_processes_write_shards_of_their_own(tmp_path, source, tokens, monkeypatch):
    monkeypatch.setattr(token_writer.jax, "process_count", lambda: 2)
    for process, count in ((1, 10), (0, 13)):
        monkeypatch.setattr(token_writer.jax, "process_index", lambda process=process: process)
        assert write(tmp_path, source) == count
        if process == 1:
            with pytest.raises(
                UserError,
                match=r"not complete: tokens-00000-of-00005\.array_record is missing",
            ):
                TokensSource(tmp_path)
    assert shards(tmp_path) == shards(tokens)


def test_a_folder_holds_one_kind_of_tokens(tmp_path, source, tokens):
    with pytest.raises(
        UserError,
        match=r"has other tokens \(versions was Versions",
    ):
        write(tokens, source, Versions(flips=True))
    with pytest.raises(
        UserError, match="image_size must be a multiple of the tokenizer's downsampling 2, got 9"
    ):
        describe(source, tiny_models.TOKENIZER, PARAMS, image_size=9)
    with pytest.raises(ConfigError, match="crops must be between 0 and 2147483647, got -1"):
        Versions(crops=-1)


def test_a_full_disk_is_one_line_and_leaves_no_shard(tmp_path, source, monkeypatch):
    class FullDisk:
        def __init__(self, path, options):
            open(path, "wb").close()

        def write(self, record):
            raise RuntimeError("write() failed: No space left on device; writing x")

        def close(self):
            pass

    monkeypatch.setattr(token_writer, "ArrayRecordWriter", FullDisk)
    with pytest.raises(
        UserError,
        match=r"^cannot write the tokens .*-00000-of-.*array_record: .*No space left on device$",
    ):
        write(tmp_path, source)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_as_a_data_source(tokens):
    config = DataConfig(source="tokens", path=str(tokens))
    train, held_out = config.open_splits()
    assert (len(train), len(held_out)) == (22, 1)
    again = pickle.loads(pickle.dumps(train))
    batch = next(make_loader(again, batch_size=4, seed=0))
    assert (
        batch["codes"].shape == (4, 4, 4, 1)
        and batch["codes"].dtype == np.uint8
        and batch["label"].dtype == np.int32
    )
    train, held_out = dataclasses.replace(config, held_out=str(tokens)).open_splits()
    assert (len(train), len(held_out)) == (23, 23)


def test_images_that_the_source_holds_out_stay_so(source, tmp_path):
    marked = ArraySource(source.arrays, source.class_names)
    marked.held_out = np.arange(COUNT) % 10 == 3
    write(tmp_path, marked)
    train, held_out = DataConfig(source="tokens", path=str(tmp_path)).open_splits()
    tokens = TokensSource(tmp_path)
    assert (len(train), len(held_out)) == (21, 2)
    for split, index in enumerate((3, 13)):
        np.testing.assert_array_equal(held_out[split]["codes"], tokens[index]["codes"])
    with pytest.raises(UserError, match=r"other tokens \(other images are held out\)"):
        write(tmp_path, source)


@pytest.mark.slow
def test_workers_and_resuming(tokens):
    source = TokensSource(tokens)
    threads, processes = (
        make_loader(source, batch_size=7, seed=1, workers=workers) for workers in (0, 2)
    )
    batches = [next(threads) for _ in range(6)]
    processes.set_state({"next_batch": 2})
    for batch in batches[2:]:
        other = next(processes)
        np.testing.assert_array_equal(batch["codes"], other["codes"])
        np.testing.assert_array_equal(batch["label"], other["label"])
    processes.close()


def test_tokens_that_a_model_cannot_take(tokens, tmp_path):
    config = tiny_models.TOKENIZER
    assert check_tokens(tokens, config, PARAMS, image_size=SIZE).records == COUNT
    assert check_tokens(
        tokens, config, {"encoder": jax.tree.map(np.asarray, PARAMS["encoder"])}, image_size=SIZE
    )
    with pytest.raises(UserError, match="are of images of 8 pixels, the model's of 16"):
        check_tokens(tokens, config, PARAMS, image_size=16)
    with pytest.raises(
        UserError, match=r"are of the tokenizer TokenizerConfig.*and the model's is"
    ):
        check_tokens(tokens, dataclasses.replace(config, ch=64), PARAMS, image_size=SIZE)
    other = jax.tree.map(lambda a: a + 1, PARAMS)
    with pytest.raises(
        UserError,
        match=r"another tokenizer of the same sizes \(.*[0-9a-f]{16}, .*[0-9a-f]{16}\)",
    ):
        check_tokens(tokens, config, other, image_size=SIZE)
    with pytest.raises(UserError, match=r"no tokens in .*\(no manifest.json\)"):
        check_tokens(tmp_path, config, PARAMS, image_size=SIZE)


def test_manifests_that_cannot_be_read(tmp_path, tokens):
    text = (tokens / "manifest.json").read_text()
    for changed, message in (
        (text[:-20], "cannot be read: Input data was truncated; write the tokens again"),
        (text.replace('"records"', '"recordz"'), "unknown fields: recordz"),
        (
            text.replace('"format_version": 3', '"format_version": 1'),
            "has format 1, and this version reads 3; write the tokens again$",
        ),
    ):
        assert changed != text
        (tmp_path / "manifest.json").write_text(changed)
        with pytest.raises(UserError, match=message):
            Manifest.read(tmp_path)


@pytest.fixture
def copy(tmp_path, tokens):
    """Another folder of the same tokens, to be changed."""
    return Path(shutil.copytree(tokens, tmp_path / "copy"))


def shard(folder, number):
    return folder / f"tokens-0000{number}-of-00005.array_record"


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1  # More than half of such a small file is padding.
    path.write_bytes(data)


def swap(folder):
    shard(folder, 1).rename(folder / "aside")
    shard(folder, 3).rename(shard(folder, 1))
    (folder / "aside").rename(shard(folder, 3))


def test_swapped_shards_are_named_and_replaced(copy, source, tokens):
    swap(copy)
    with pytest.raises(
        UserError,
        match=r"00001-of-00005\.array_record is damaged \(shard is 3, not 1\)",
    ):
        TokensSource(copy)
    assert write(copy, source) == 10
    assert shards(copy) == shards(tokens)


def test_a_shard_of_other_tokens_or_without_a_seal_is_named(copy, tokens, source, tmp_path):
    renamed = ArraySource(source.arrays, ("a", "b", "d"))
    write(tmp_path / "other", renamed)
    shutil.copy(shard(tmp_path / "other", 2), shard(copy, 2))
    with pytest.raises(
        UserError,
        match=r"00002-of-00005\.array_record is damaged \(tokens is [0-9a-f]{16}, not ",
    ):
        TokensSource(copy)
    (copy / "manifest.json").write_bytes((tmp_path / "other" / "manifest.json").read_bytes())
    with pytest.raises(UserError, match=r"00000-of-00005\.array_record is damaged \(tokens is "):
        TokensSource(copy)
    (copy / "manifest.json").write_bytes((tokens / "manifest.json").read_bytes())
    for records in ([b"x"] * 5, []):
        writer = ArrayRecordWriter(str(shard(copy, 2)), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
        with pytest.raises(UserError, match=r"00002-of-00005\.array_record is damaged \("):
            TokensSource(copy)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda records: records[1:], "records is 4, not 5"),
        (lambda records: [records[1], records[0], *records[2:]], "checksum is "),
        (lambda records: [*records, records[0]], r"records is 6, not 5"),
    ],
)
def test_changed_records_do_not_match_the_seal(copy, source, change, problem):
    """The seal has their number and checksum; its position is the actual number."""
    reader = ArrayRecordReader(str(shard(copy, 1)))
    *records, seal = reader.read_all()
    reader.close()
    changed = change(records)
    writer = ArrayRecordWriter(str(shard(copy, 1)), "group_size:1")
    for record in [*changed, Seal.unpack(seal)._replace(records=len(changed)).pack()]:
        writer.write(record)
    writer.close()
    with pytest.raises(UserError, match=rf"00001-of-00005\.array_record is damaged \({problem}"):
        TokensSource(copy)
    assert write(copy, source) == 5


def test_a_flipped_bit_is_named_at_the_start_and_when_read(copy, source, tokens):
    opened = TokensSource(copy)
    flip(shard(copy, 1), 100)  # in the first record
    message = r"tokens-00001-of-00005.array_record is damaged"
    with pytest.raises(UserError, match=message):
        [opened[index] for index in range(5, 10)]
    with pytest.raises(UserError, match=message):
        TokensSource(copy)
    assert write(copy, source) == 5
    assert shards(copy) == shards(tokens)
