import itertools
import re
import subprocess
import sys

import numpy as np
import pytest

from bitdance_jax.config import AugmentConfig
from bitdance_jax.data.crop_sizes import CropSizes
from bitdance_jax.data.loader import make_loader
from bitdance_jax.data.sources import ArraySource, FolderSource
from bitdance_jax.errors import FileError, UserError
from bitdance_jax.io.image_files import DamagedImage


COUNT = 25
AUGMENT = AugmentConfig(min_crop=0.5, flip=0.5)


@pytest.fixture(scope="module")
def source():
    """25 noise images; the label is the record's number."""
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 16, 16, 3), dtype=np.uint8)
    return ArraySource({"image": images, "label": np.arange(COUNT)}, tuple(map(str, range(COUNT))))


def loader(source, **options):
    return make_loader(
        source, **{"batch_size": 4, "seed": 0, "image_size": 8, "augment": AUGMENT} | options
    )


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def test_batches_have_the_promised_shapes(source):
    (batch,) = take(loader(source), 1)
    assert batch["image"].shape == (4, 8, 8, 3) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (4,) and batch["label"].dtype == np.int32


def test_every_epoch_holds_each_record_once_in_a_new_order(source):
    labels = np.concatenate([batch["label"] for batch in take(loader(source), COUNT)])  # 4 epochs
    epochs = labels.reshape(4, COUNT)
    assert (np.sort(epochs) == np.arange(COUNT)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_one_ordered_epoch_ends_with_what_is_left(source):
    batches = list(loader(source, shuffle=False, repeat=False))
    assert [len(batch["label"]) for batch in batches] == [4] * 6 + [1]
    assert np.concatenate([batch["label"] for batch in batches]).tolist() == list(range(COUNT))


def test_the_seed_decides_everything(source):
    batches = take(loader(source), 10)
    assert_same(take(loader(source), 10), batches)
    other = take(loader(source, seed=1), 10)
    assert any(
        (batch["label"] != b["label"]).any() for batch, b in zip(batches, other, strict=True)
    )


def test_draws_depend_on_the_record_and_epoch_only(source):
    """The same record looks the same in one epoch whatever the order and batch size, and different
    in the next."""

    def by_record(**options):
        records = {}
        for batch in take(loader(source, **options), 2 * COUNT // options["batch_size"]):
            for label, image in zip(batch["label"], batch["image"], strict=True):
                records.setdefault(int(label), []).append(image)
        return records

    shuffled, ordered = by_record(batch_size=5), by_record(batch_size=1, shuffle=False)
    changed = 0
    for record in range(COUNT):
        np.testing.assert_array_equal(shuffled[record], ordered[record])
        changed += not np.array_equal(*shuffled[record])
    assert changed > COUNT * 0.8


def test_resume_in_the_middle_of_an_epoch_is_exact(source):
    iterator = loader(source)
    take(iterator, 9)
    state = iterator.get_state()
    expected = take(iterator, 6)

    fresh = loader(source)
    fresh.set_state(state)
    assert fresh.get_state() == state
    assert_same(take(fresh, 6), expected)

    iterator.set_state(state)  # back in time
    assert_same(take(iterator, 6), expected)


def test_resume_at_the_end_is_the_end(source):
    iterator = loader(source, repeat=False)
    assert len(list(iterator)) == 7
    fresh = loader(source, repeat=False)
    fresh.set_state(iterator.get_state())
    assert list(fresh) == []


@pytest.mark.slow
def test_workers_change_nothing_and_a_state_fits_any_number_of_them(source):
    iterator = loader(source)
    expected = take(iterator, 8)
    with_workers = loader(source, workers=2)
    assert_same(take(with_workers, 5), expected[:5])
    state = with_workers.get_state()
    assert_same(take(with_workers, 3), expected[5:])

    iterator.set_state(state)
    assert_same(take(iterator, 3), expected[5:])
    with_workers.set_state(state)
    assert_same(take(with_workers, 3), expected[5:])
    with_workers.close()


def test_without_augmentation_crops_are_centred(source):
    (batch,) = take(loader(source, image_size=16, augment=None, shuffle=False), 1)
    np.testing.assert_array_equal(batch["image"], source.arrays["image"][:4])


def test_random_crops_fade_out_and_flips_do_not():
    """To the last epoch, long after the decay, half of the centre crops are flipped."""
    count = 400
    images = np.random.default_rng(0).integers(0, 256, (count, 2, 6, 3), dtype=np.uint8)
    source = ArraySource({"image": images, "label": np.arange(count)}, ())
    fading = AugmentConfig(min_crop=1.0, flip=0.5, decay_start=1, decay_end=3)
    centre, flipped = [], []
    for batch in take(loader(source, batch_size=count, image_size=2, augment=fading), 9):
        middle = images[batch["label"]][:, :, 2:4]
        same = (batch["image"] == middle).all((1, 2, 3))
        mirrored = (batch["image"] == middle[:, :, ::-1]).all((1, 2, 3))
        centre.append(np.mean(same | mirrored))
        flipped.append(np.mean(mirrored))
    assert (
        max(centre[:2]) < 0.3 and 0.5 < centre[2] < 0.7
    )  # one random crop of five is the centre one
    assert centre[3:] == [1] * 6
    assert all(0.4 < share < 0.6 for share in flipped[3:])


def test_tokens_come_in_one_version():
    count = 400
    labels = np.arange(count)
    arrays = {
        "codes": np.zeros((count, 2, 2, 4), np.uint8),
        "codes_flipped": np.ones((count, 2, 2, 4), np.uint8),
        "label": labels,
    }
    source = ArraySource(arrays, ())
    (plain,) = take(make_loader(source, batch_size=count, seed=0), 1)
    assert plain.keys() == {"codes", "label"} and (plain["codes"] == 0).all()
    (batch,) = take(
        make_loader(source, batch_size=count, seed=0, augment=AugmentConfig(flip=0.25)), 1
    )
    assert batch.keys() == {"codes", "label"} and batch["codes"].dtype == np.uint8
    assert 0.18 < batch["codes"][:, 0, 0, 0].mean() < 0.32
    faded = AugmentConfig(flip=0.25, decay_start=0, decay_end=0)
    (batch,) = take(make_loader(source, batch_size=count, seed=0, augment=faded), 1)
    assert 0.18 < batch["codes"][:, 0, 0, 0].mean() < 0.32


def test_random_crops_of_tokens_are_all_chosen_and_the_centre_one_where_they_have_faded_out():
    """Flipped half of the times, as that of an image."""
    count = 300
    crops = np.broadcast_to(
        np.arange(1, 4, dtype=np.uint8)[None, :, None, None, None], (count, 3, 2, 2, 4)
    )
    codes = np.zeros((count, 2, 2, 4), np.uint8)
    arrays = {
        "codes": codes,
        "codes_flipped": codes + 9,
        "codes_crops": crops,
        "label": np.arange(count),
    }
    source = ArraySource(arrays, ())
    (batch,) = take(make_loader(source, batch_size=count, seed=0, augment=AugmentConfig()), 1)
    assert batch["codes"].shape == (count, 2, 2, 4)
    assert (np.bincount(batch["codes"][:, 0, 0, 0], minlength=10)[1:4] > 70).all() and set(
        np.unique(batch["codes"])
    ) == {1, 2, 3}
    (faded,) = take(
        make_loader(
            source, batch_size=count, seed=0, augment=AugmentConfig(decay_start=0, decay_end=0)
        ),
        1,
    )
    assert (
        set(np.unique(faded["codes"])) == {0, 9}
        and 0.4 < np.mean(faded["codes"][:, 0, 0, 0] == 9) < 0.6
    )
    (plain,) = take(make_loader(source, batch_size=count, seed=0), 1)
    assert (plain["codes"] == 0).all()


@pytest.mark.parametrize("batch_size", [6, 40])
@pytest.mark.parametrize(
    "shares", [["012", "345"], ["03", "14", "25"], ["0", "12345"], ["012", "012", "345"]]
)
def test_processes_load_the_rows_of_the_same_batch(source, shares, batch_size):
    """Also if the rows of a process are several chunks, and if processes load the same rows. The
    number of processes changes on resuming."""
    group = -(-batch_size // 6)
    rows = [
        np.array([r for r in range(batch_size) if str(r // group) in share]) for share in shares
    ]
    complete = take(loader(source, batch_size=batch_size), 4)
    parts = [loader(source, batch_size=batch_size, rows=r) for r in rows]
    for number, batch in enumerate(complete):
        if number == 2:
            state = parts[-1].get_state()
            rows = [np.arange(batch_size)[half::2] for half in range(2)]
            parts = [loader(source, batch_size=batch_size, rows=r) for r in rows]
            for part in parts:
                part.set_state(state)
        for r, part in zip(rows, parts, strict=True):
            assert_same([next(part)], [{name: array[r] for name, array in batch.items()}])


def test_a_last_smaller_batch_is_omitted(source):
    batches = list(loader(source, shuffle=False, repeat=False, rows=np.array([1, 3])))
    assert np.concatenate([batch["label"] for batch in batches]).tolist() == [
        n for n in range(24) if n % 2
    ]


@pytest.mark.parametrize("rows", [[], [1, 0], [0, 4], [-1, 2], [1, 1]])
def test_rows_must_be_rows_of_the_batch(source, rows):
    with pytest.raises(ValueError, match="rows must be ascending row numbers of a batch of 4"):
        loader(source, rows=np.array(rows, int))


class PartlyDamaged:
    """Every pixel of image i is i mod 256; some images cannot be read."""

    class_names = ("a",)

    def __init__(self, count, damaged):
        self.count, self.damaged = count, damaged

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.damaged:
            raise DamagedImage(f"cannot read the image {index}.jpg")
        return {"image": np.full((8, 8, 3), index % 256, np.uint8), "label": index}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_next_undamaged_image_replaces_a_damaged_one(capfd, workers):
    damaged = {3, 4, 24}
    iterator = loader(PartlyDamaged(25, damaged), workers=workers, shuffle=False, batch_size=5)
    labels = np.concatenate([batch["label"] for batch in take(iterator, 10)])
    epoch = [0, 1, 2, 5, 5, *range(5, 24), 0]
    assert labels.tolist() == epoch * 2
    assert iterator.skipped == {
        f"cannot read the image {n}.jpg": 2 * (1 + (n == 4)) for n in damaged
    }
    iterator.close()
    lines = capfd.readouterr().err.splitlines()
    assert [line.startswith("warning: cannot read the image ") for line in lines] == [
        True
    ] * 3  # each once
    assert (
        lines[2]
        == "warning: cannot read the image 24.jpg; the next one replaces it (3 skipped so far)"
    )


def test_replacements_do_not_depend_on_the_processes():
    source = PartlyDamaged(200, set(range(0, 200, 12)))
    complete = take(loader(source, batch_size=8), 10)
    parts = [loader(source, batch_size=8, rows=np.arange(8)[half::2]) for half in range(2)]
    for batch in complete:
        for half, part in enumerate(parts):
            assert_same([next(part)], [{name: array[half::2] for name, array in batch.items()}])


def test_many_damaged_images_are_an_error():
    fine = loader(PartlyDamaged(5000, set(range(0, 5000, 20))), batch_size=50)
    take(fine, 60)
    with pytest.raises(
        UserError,
        match=r"1\d\d of the last \d+ images could not be read, cannot read the image \d+\.jpg;",
    ):
        take(loader(PartlyDamaged(5000, set(range(0, 5000, 8))), batch_size=50), 60)
    with pytest.raises(
        UserError,
        match=r"^20 images in a row are damaged; the last: cannot read the image \d+\.jpg",
    ):
        take(loader(PartlyDamaged(100, set(range(100))), batch_size=4), 1)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_nothing_but_damaged_images_stops_with_one_line(tmp_path, workers):
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "broken.png").write_bytes(b"not an image")
    iterator = loader(FolderSource(tmp_path), workers=workers)
    with pytest.raises(UserError) as caught:
        next(iterator)
    assert re.fullmatch(
        r"1 image is damaged; the last: cannot read the image .*broken\.png .*",
        str(caught.value),
    )
    iterator.close()


@pytest.mark.slow
def test_a_program_with_workers_ends_quietly():
    program = """
from bitdance_jax.data.loader import make_loader
from bitdance_jax.data.emoji import EmojiSource

if __name__ == "__main__":
    batches = make_loader(EmojiSource(), batch_size=8, seed=0, image_size=64, workers=2)
    next(batches)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


CROPS = CropSizes(sizes=(8, 12), weights=(3.0, 1.0), seed=5)


def test_the_number_of_a_batch_decides_the_size_of_its_crops(source):
    """Also after resuming, and for a process that loads some of the rows."""
    batches = take(loader(source, image_size=CROPS), 12)
    sides = [batch["image"].shape[1] for batch in batches]
    assert sides == [CROPS.of_batch(number) for number in range(12)] and set(sides) == {8, 12}
    share = np.mean([CROPS.of_batch(number) == 8 for number in range(2000)])
    assert share == pytest.approx(0.75, abs=0.04)

    resumed = loader(source, image_size=CROPS)
    resumed.set_state({"next_batch": 7})
    assert_same(take(resumed, 5), batches[7:])
    rows = take(loader(source, image_size=CROPS, rows=np.array([1, 3])), 12)
    assert_same(rows, [{name: x[[1, 3]] for name, x in batch.items()} for batch in batches])


class Small:
    """Every fifth of 50 images is smaller than 8 pixels; labels are their numbers."""

    class_names = ("images",)

    def __len__(self):
        return 50

    def __getitem__(self, index):
        height = 6 if index % 5 == 0 else 10
        return {"image": np.full((height, 12, 3), index, np.uint8), "label": np.int32(index)}


def test_small_images_are_enlarged_and_counted(capfd):
    batch = take(loader(Small(), batch_size=50, shuffle=False), 1)[0]
    assert batch.keys() == {"image", "label"} and batch["image"].shape == (50, 8, 8, 3)
    notes = capfd.readouterr().err.splitlines()
    assert [note.rpartition(": ")[2] for note in notes] == [
        "4 so far, for 16 read",
        "10 so far, for 48 read",
    ]
    assert all(
        note.startswith("note: images smaller than their crops are enlarged") for note in notes
    )


def test_small_images_are_skipped_as_configured(capfd):
    """However many they are, until there is no end of them."""
    skip = AugmentConfig(small_images="skip")
    batches = loader(Small(), batch_size=10, shuffle=False, augment=skip)
    labels = next(batches)["label"]
    np.testing.assert_array_equal(labels, [1, 1, 2, 3, 4, 6, 6, 7, 8, 9])
    assert "crops are skipped (data.augment.small_images): 2 so far, for 10 read" in (
        capfd.readouterr().err
    )
    with pytest.raises(FileError, match="50 images in a row are smaller than the crop of 64"):
        next(loader(Small(), image_size=64, augment=skip))
