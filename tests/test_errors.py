"""Errors keep what they name, also on their way between processes."""

import pickle
from pathlib import Path

import pytest

from bitdance_jax import ConfigError, FileError, ResourceError, UserError
from bitdance_jax.config import MeshConfig, RunConfig, from_dict
from bitdance_jax.errors import short


def test_a_config_error_names_the_field():
    with pytest.raises(ConfigError) as caught:
        RunConfig(workdir="runs/x", steps=0)
    assert caught.value.field == "steps"
    with pytest.raises(ConfigError) as caught:
        from_dict(MeshConfig, {"tensor": "two"}, "mesh")
    assert caught.value.field == "mesh.tensor"


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("steps must be positive", "steps"),
        FileError("there is no file a.pt", Path("a.pt")),
        ResourceError("the disk is full"),
    ],
)
def test_an_error_crosses_processes(error):
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, UserError)
    assert type(copy) is type(error)
    assert (str(copy), vars(copy)) == (str(error), vars(error))


def test_a_path_is_text():
    assert FileError("no", Path("a.pt")).path == "a.pt"


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, [[[[[1]]]]], 10**5000, "a\nb"],
    ids=["long", "deep", "many digits", "two lines"],
)
def test_short_fits_on_a_line(value):
    text = short(value)
    assert "\n" not in text
    assert len(text) < 200
