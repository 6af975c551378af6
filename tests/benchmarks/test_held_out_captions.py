"""The judge of held-out captions: what counts as the same base name and skin tone."""

import numpy as np
import pytest
from benchmark_files import benchmark


@pytest.fixture(scope="module")
def judge():
    with benchmark("held_out_captions") as module:
        yield module


def test_base_name_and_skin_tone(judge):
    split = judge.split_caption
    assert split("woman, dark skin tone, beard") == ("woman, beard", "dark skin tone")
    assert split("OK hand, light skin tone") == ("OK hand", "light skin tone")
    assert split("family, woman, boy") == ("family, woman, boy", None)
    both = "kiss, man, man, dark skin tone, light skin tone"
    assert split(both) == ("kiss, man, man", None)


def test_shares(judge):
    captions = ["man, dark skin tone", "man, light skin tone", "frog"]
    found = ["man, light skin tone", "woman, light skin tone", "frog"]
    # Skin tones count only where the caption has one.
    assert judge.shares(captions, found) == judge.Shares(base_name=2 / 3, skin_tone=1 / 2)


def test_nearest_ignores_the_length(judge):
    real = np.array([[1.0, 0.0], [0.0, 5.0]])
    assert judge.nearest(np.array([[3.0, 1.0], [0.1, 0.2]]), real).tolist() == [0, 1]
