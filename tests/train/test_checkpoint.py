"""Checkpoints: damaged ones, other models, a full disk, retention."""

import errno
import resource
import shutil
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from bitdance_jax.distributed.mesh import make_mesh
from bitdance_jax.errors import UserError
from bitdance_jax.train.checkpoint import Checkpoints, is_disk_full
from bitdance_jax.train.state import TrainState, abstract_state, init_state


# After a failed read, TensorStore's pending ones raise errors, whichever test runs then.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

OPTIMIZER = optax.adamw(
    optax.constant_schedule(1e-3), mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
)
MESH = make_mesh(devices=jax.devices()[:1])


def make_state(toy, step: int, width: int = 512) -> TrainState:
    state = init_state(toy.ToyObjective(width), OPTIMIZER, jax.random.key(0))
    return state.replace(step=jnp.int32(step), ema=jax.tree.map(lambda x: x + step, state.ema))


def abstract(toy, width: int = 512, optimizer=OPTIMIZER) -> TrainState:
    return abstract_state(toy.ToyObjective(width), optimizer, MESH)


@pytest.fixture
def folder(toy, tmp_path) -> Path:
    """Checkpoints of the steps 1, 2 and 3, of which the newest two remain."""
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(
                step, make_state(toy, step), {"parent": {"next_index": 8 * step}, "epoch": 0}
            )
    return tmp_path / "checkpoints"


def restore(folder: Path, abstract: TrainState) -> tuple[TrainState, dict] | None:
    with Checkpoints(folder, keep=2) as checkpoints:
        return checkpoints.restore(abstract)


def test_the_newest_is_restored(toy, folder):
    state, iterator_state = restore(folder, abstract(toy))
    assert iterator_state == {"parent": {"next_index": 24}, "epoch": 0}
    jax.tree.map(np.testing.assert_array_equal, state, make_state(toy, 3))
    assert jax.tree.structure(state) == jax.tree.structure(make_state(toy, 3))


def test_only_the_newest_remain(folder):
    with Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.steps == [2, 3]


def test_an_empty_folder_has_nothing_to_restore(toy, tmp_path):
    assert restore(tmp_path / "none", abstract(toy)) is None


def damage(folder: Path, how: str) -> None:
    weights = max((folder / "state").rglob("d/*"), key=lambda file: file.stat().st_size)
    match how:
        case "truncated weights":
            weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 3])
        case "empty weights":
            weights.write_bytes(b"")
        case "changed weights":
            data = bytearray(weights.read_bytes())
            data[len(data) // 2] ^= 16
            weights.write_bytes(data)
        case "no index":
            (folder / "state/manifest.ocdbt").unlink()
        case "truncated list of arrays":
            (folder / "state/_METADATA").write_text("{")
        case "no iterator state":
            shutil.rmtree(folder / "iterator")
        case "nothing inside":
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()


DAMAGES = [
    "truncated weights",
    "empty weights",
    "changed weights",
    "no index",
    "truncated list of arrays",
    "no iterator state",
    "nothing inside",
]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_one_is_reported_and_the_one_before_used(toy, folder, capfd, how):
    damage(folder / "3", how)
    with Checkpoints(folder, keep=2) as checkpoints:
        state, _ = checkpoints.restore(abstract(toy))
        assert int(state.step) == 2
        assert checkpoints.steps == [2]
        checkpoints.save(3, make_state(toy, 3), {})
    with Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.steps == [2, 3]
        assert int(checkpoints.restore(abstract(toy))[0].step) == 3
    if how != "nothing inside":  # To Orbax that is no checkpoint.
        assert f"checkpoint {folder}/3 is damaged and skipped" in capfd.readouterr().err
        assert (folder / "3.damaged").is_dir()


def test_if_all_are_damaged_nothing_is_changed(toy, folder):
    for step in (2, 3):
        damage(folder / str(step), "no index")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
        restore(folder, abstract(toy))
    assert {"2", "3"} <= {path.name for path in folder.iterdir()}


def test_a_checkpoint_of_another_model_is_an_error(toy, folder):
    with pytest.raises(
        UserError,
        match=r"another model: ema/fc1/bias is float32\[512\] there and float32\[32\] in",
    ):
        restore(folder, abstract(toy, width=32))
    assert {"2", "3"} <= {path.name for path in folder.iterdir()}


def test_a_checkpoint_of_another_optimizer_is_an_error(toy, folder):
    with pytest.raises(UserError, match=r"is of another model: opt_state/.* missing"):
        restore(folder, abstract(toy, optimizer=optax.sgd(0.1, momentum=0.9)))


def test_a_full_disk_leaves_the_earlier_checkpoints(toy, folder, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match="No space left") as caught,
        Checkpoints(folder, keep=2) as checkpoints,
    ):
        patch.setattr(ocp.StandardCheckpointHandler, "finalize", full)
        checkpoints.save(4, make_state(toy, 4), {})
    assert is_disk_full(caught.value)
    state, _ = restore(folder, abstract(toy))
    assert int(state.step) == 3


def test_a_failed_save_leaves_no_temporary_files(toy, folder):
    """The operating system limits the size of files."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (
        pytest.raises(Exception, match="File too large"),
        Checkpoints(folder, keep=2) as checkpoints,
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        try:
            checkpoints.save(4, make_state(toy, 4), {})
            checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    time.sleep(0.2)  # for writes that might still run
    assert {path.name for path in folder.iterdir()} == {"2", "3"}


def test_other_folders_are_not_mistaken_for_checkpoints(toy, tmp_path):
    """Orbax would remove the oldest of them."""
    for year in ("2023", "2024", "2025"):
        (tmp_path / year).mkdir()
        (tmp_path / year / "beach.jpg").touch()
    with pytest.raises(UserError, match=r"20\d\d is not a checkpoint; .*run\.checkpoints"):
        Checkpoints(tmp_path, keep=2)
    assert len(list(tmp_path.rglob("beach.jpg"))) == 3


def test_google_storage_without_its_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(
        UserError,
        match=r'^gs://bucket/run needs a library .* pip install "bitdance_jax\[gcs\]"$',
    ):
        Checkpoints("gs://bucket/run", keep=2)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"^cannot make the folder .*/file/checkpoints: Not a directory$"
    ):
        Checkpoints(tmp_path / "file" / "checkpoints", keep=2)


def test_errors_of_a_full_disk():
    assert is_disk_full(OSError(errno.ENOSPC, "No space left on device"))
    assert is_disk_full(ValueError("RESOURCE_EXHAUSTED: Failed to write [Disk quota exceeded]"))
    assert not is_disk_full(MemoryError("RESOURCE_EXHAUSTED: out of memory"))
