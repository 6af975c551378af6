"""The published state dict as parameters, from any file format, with a check of all keys."""

import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from golden_models import GOLDEN
from inception_weights import state_dict

from bitdance_jax.errors import FileError, UserError
from bitdance_jax.fid import inception_weights


def flat(params):
    return traverse_util.flatten_dict(params, sep="/")


@pytest.fixture(scope="module")
def params():
    return flat(inception_weights.convert(state_dict()))


def test_batch_norms_are_folded_into_the_convolutions(params):
    """Convolution and batch norm of one position, as torch computes them."""
    state = state_dict()
    name = "Mixed_6d.branch1x1"
    x = np.random.default_rng(0).standard_normal(768)
    norm = {
        part: state[f"{name}.bn.{part}"].astype(float)
        for part in ("weight", "bias", "running_mean", "running_var")
    }
    y = state[f"{name}.conv.weight"][:, :, 0, 0] @ x
    expected = (
        norm["weight"] * (y - norm["running_mean"]) / np.sqrt(norm["running_var"] + 1e-3)
        + norm["bias"]
    )
    kernel, bias = params["Mixed_6d/branch1x1/conv/kernel"], params["Mixed_6d/branch1x1/conv/bias"]
    np.testing.assert_allclose(x @ kernel[0, 0] + bias, expected, atol=1e-5)


def test_every_key_is_used_and_unneeded_keys_are_optional(params):
    state = state_dict()
    convolutions = sum(key.endswith("conv.weight") for key in state)
    assert len(params) == 2 * convolutions + 1
    assert len(state) == 5 * convolutions + 2
    assert all(array.dtype == np.float32 for array in params.values())
    counted = state | {"Conv2d_1a_3x3.bn.num_batches_tracked": np.array(3)}
    del counted["fc.bias"]
    assert flat(inception_weights.convert(counted)).keys() == params.keys()


def test_all_wrong_keys_are_listed_at_once():
    state = dict(state_dict())
    del state["Mixed_5b.branch1x1.conv.weight"], state["Mixed_7c.branch_pool.bn.running_var"]
    state |= {"AuxLogits.fc.bias": np.zeros(3), "fc.weight": np.zeros((1000, 2048), np.float32)}
    with pytest.raises(UserError) as caught:
        inception_weights.convert(state)
    assert str(caught.value) == (
        "missing Mixed_5b.branch1x1.conv.weight, missing Mixed_7c.branch_pool.bn.running_var, "
        "unknown AuxLogits.fc.bias, fc.weight is (1000, 2048) instead of (1008, 2048)"
    )


def test_safetensors(tmp_path, params):
    safetensors.numpy.save_file(state_dict(), tmp_path / "inception.safetensors")
    loaded = flat(inception_weights.load(tmp_path / "inception.safetensors"))
    assert all(np.array_equal(loaded[path], params[path]) for path in params)


def test_a_torch_file_is_read_lazily_and_refused_for_its_keys():
    with pytest.raises(FileError, match=r"legacy\.pth .*missing .*unknown conv\.weight"):
        inception_weights.load(GOLDEN / "evaluation" / "legacy.pth")


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_other_files(tmp_path, name):
    with pytest.raises(FileError, match=rf"{name}; fetch https://"):
        inception_weights.load(tmp_path / name)
    (tmp_path / name).write_text("something else")
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        inception_weights.load(tmp_path / name)
