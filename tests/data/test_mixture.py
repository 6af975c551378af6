import pickle
from collections import Counter

import numpy as np
import pytest

from bitdance_jax.data.buckets import Buckets, cover_crop
from bitdance_jax.data.captioned import CaptionedImage, Skips
from bitdance_jax.data.mixture import Mixture
from bitdance_jax.data.proportions import Proportions
from bitdance_jax.errors import ConfigError, FileError
from bitdance_jax.io.image_files import DamagedImage


class Colours:
    """Images of one colour, the record's number; each has two captions, some are damaged."""

    splits = None

    def __init__(self, location, count, damaged=()):
        self.location = location
        self.skipped = Skips()
        self._count = count
        self._damaged = damaged

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        if index in self._damaged:
            raise DamagedImage(f"{index} is damaged")
        image = np.full((40 + index, 64, 3), index, np.uint8)
        return CaptionedImage(self.captions_of(index), image)

    def captions_of(self, index):
        return f"{index}", f"{index} again"


def mixture(sources=None, **changes):
    sources = sources or [Colours("a", 30), Colours("b", 7)]
    options = dict(
        seed=3,
        weights=[3, 1],
        resolutions=[32, 64],
        resolution_weights=[1, 3],
        size_multiple=16,
        text_drop=0.5,
    )
    return Mixture(sources, **options | changes)


@pytest.mark.parametrize("weights", [(2, 7, 1), (0.2, 0.7, 0.1), (0, 1, 1), (5,)])
def test_exact_proportions(weights):
    choices = Proportions(weights, (0, 1))
    entries = [choices[n] for n in range(200)]
    total = sum(weights)
    for which, weight in enumerate(weights):
        numbers = [entry.number for entry in entries if entry.which == which]
        assert len(numbers) == round(200 * weight / total)
        assert sorted(numbers) == list(range(len(numbers)))


def test_proportions_of_any_weights():
    weights = (3.14159, 1_281_167, 3127)
    choices = Proportions(weights, (0,))
    counts = Counter(choices[n].which for n in range(8192))
    for which, weight in enumerate(weights):
        assert abs(counts[which] - 8192 * weight / sum(weights)) <= 3
    far = 10**15
    assert choices[far] == Proportions(weights, (0,))[far]


def test_sources_and_resolutions_are_independent():
    drawn = mixture(weights=[1, 1], resolution_weights=[1, 1])
    pairs = Counter((record.source, side) for record, side in map(drawn.plan, range(80)))
    assert set(pairs.values()) == {20}


def test_each_epoch_of_a_source_has_every_record_once():
    plans = [p for p, _ in map(mixture().plan, range(120)) if p.source == 0]
    assert len(plans) == 90
    epochs = [
        [p.index for p in sorted(plans, key=lambda p: p.number) if p.epoch == e] for e in range(3)
    ]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_sample_is_a_function_of_seed_and_number():
    one, other = mixture(), pickle.loads(pickle.dumps(mixture()))
    for n in (5, 0, 77, 10**9):
        a, b = one.draw(n), other.draw(n)
        assert a.caption == b.caption
        assert a.source == b.source
        assert np.array_equal(a.record.image, b.record.image)
    seeds = [[mixture(seed=seed).plan(n) for n in range(20)] for seed in (3, 4)]
    assert seeds[0] != seeds[1]


def test_captions_are_drawn_and_dropped():
    samples = list(map(mixture().draw, range(160)))
    captions = Counter(
        "none" if s.caption is None else s.caption.endswith("again") for s in samples
    )
    assert 60 < captions["none"] < 100
    assert 20 < captions[True] < 60
    for sample in samples:
        assert sample.caption in (None, *sample.record.captions)
        assert sample.record.image[0, 0, 0] == int(sample.record.captions[0])
        assert sample.record.image.shape == (*sample.size, 3)
        assert sample.size in Buckets(sample.resolution, 16).sizes


def test_damaged_records_are_replaced_and_named():
    damaged = mixture([Colours("a", 5, damaged=(2, 3))], weights=None)
    samples = {damaged.plan(n)[0].index: damaged.draw(n) for n in range(5)}
    assert samples[2].record.captions == samples[3].record.captions == ("4", "4 again")
    assert samples[2].skipped == ("2 is damaged", "3 is damaged")
    assert samples[1].skipped == ()
    with pytest.raises(FileError, match="5 images in a row are damaged; the last"):
        mixture([Colours("a", 5, damaged=range(5))], weights=None).draw(0)


def test_images_that_are_too_small():
    large = dict(resolutions=[64], resolution_weights=None, size_multiple=64, weights=None)
    up = [mixture([Colours("a", 30)], **large).draw(n) for n in range(30)]
    assert sum(sample.upscaled for sample in up) == 24  # Those of fewer than 64 rows.
    skipping = mixture([Colours("a", 30)], too_small="skip", **large)
    samples = {skipping.plan(n)[0].index: skipping.draw(n) for n in range(30)}
    assert samples[26].record.captions[0] == "26"
    assert samples[20].record.captions[0] == "24"
    assert samples[20].skipped == ()
    assert samples[20].too_small[0] == "image 20 of a is too small for 64 pixels"
    with pytest.raises(FileError, match=r"5 images in a row are too small; .* resolution 64, or"):
        mixture([Colours("a", 5)], too_small="skip", **large).draw(0)


def test_released_buckets():
    def sizes(resolution, multiple):
        return {size for size in Buckets(resolution, multiple).sizes if size[0] <= size[1]}

    wide = {(512, 2048), (512, 1920), (640, 1536), (768, 1280), (896, 1152), (1024, 1024)}
    assert sizes(1024, 64) == sizes(1024, 128) == wide
    assert sizes(512, 128) == {(256, 1024), (256, 896), (384, 640), (512, 512)}
    assert sizes(256, 64) == {(128, 512), (192, 384), (192, 320), (256, 256)}
    assert sizes(256, 128) == {(128, 512), (256, 256)}


@pytest.mark.parametrize(("resolution", "multiple"), [(128, 16), (96, 32), (64, 64), (768, 128)])
def test_computed_buckets(resolution, multiple):
    sizes = Buckets(resolution, multiple).sizes
    assert (resolution, resolution) in sizes
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert 1 / 4 <= height / width <= 4
        assert 0.8 <= height * width / resolution**2 <= 1.25
        assert (width, height) in sizes


def test_no_bucket_takes_a_resolution():
    with pytest.raises(ConfigError, match=r"multiples of 64 pixels, .* got 200"):
        Buckets(200, 64)


def test_nearest_aspect_ratio():
    buckets = Buckets(1024, 128)
    assert buckets.nearest(100, 100) == (1024, 1024)
    assert buckets.nearest(3000, 4000) == (896, 1152)
    assert buckets.nearest(4000, 3000) == (1152, 896)
    assert buckets.nearest(1, 1000) == (512, 2048)


def test_crop_covers_and_is_centred():
    image = np.zeros((100, 300, 3), np.uint8)
    image[:, 90:210] = 255
    middle = cover_crop(image, (32, 32))
    assert middle.shape == (32, 32, 3)
    assert middle.min() > 250
    whole = cover_crop(image, (32, 96))
    assert np.array_equal(whole, whole[:, ::-1])
    assert whole[:, :26].max() == 0
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (32, 64, 3))
    assert np.array_equal(cover_crop(ramp, (32, 64)), ramp)
    assert abs(float(cover_crop(ramp, (32, 32)).mean()) - 31.5) < 0.1
