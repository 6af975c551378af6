import os
import pickle

import numpy as np
import pytest

from bitdance_jax.data.records import Names, Subset, select, split_indices
from bitdance_jax.data.sources import ArraySource
from bitdance_jax.errors import UserError


def test_splits_are_fixed_and_disjoint():
    train, held_out = split_indices(40, "train"), split_indices(40, "heldout")
    assert held_out.tolist() == [18, 37]
    assert sorted([*train, *held_out]) == split_indices(40, "all").tolist() == list(range(40))


@pytest.mark.parametrize(
    "count, held_out", [(1900, 100), (19_000, 1000), (19_001, 950), (1_281_167, 999)]
)
def test_of_many_records_about_a_thousand_are_held_out(count, held_out):
    indices = split_indices(count, "heldout")
    assert len(indices) == held_out and len(split_indices(count, "train")) == count - held_out
    assert len(set(np.diff(indices))) == 1  # spread evenly


def test_a_subset_keeps_its_order():
    source = ArraySource({"label": np.arange(10)}, ("a",))
    subset = Subset(source, np.array([7, 2, 2]))
    assert len(subset) == 3 and subset.class_names == ("a",)
    assert [subset[i]["label"] for i in range(3)] == [7, 2, 2]


def test_too_few_records_to_hold_any_out():
    with pytest.raises(
        UserError,
        match=r"only 18 images, .* data\.held_out",
    ):
        select(ArraySource({"label": np.arange(18)}, ("a",)), "heldout")


def test_names_are_unchanged():
    names = [
        "n01440764/a.JPEG",
        "",
        "\N{SNOWMAN} mit Leerzeichen.png",
        os.fsdecode(b"not \xff utf-8.jpg"),
        "last",
    ]
    unpickled = pickle.loads(pickle.dumps(Names.of(names)))
    assert len(unpickled) == 5 and [unpickled[i] for i in range(5)] == names
    assert len(Names.of([])) == 0
