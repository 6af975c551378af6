"""libtpu's settings are set where there is no TPU, and only there."""

import os

import pytest

from bitdance_jax.perf.libtpu import ENVIRONMENT, quiet_libtpu


@pytest.fixture
def environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("TPU_", "JAX_PLATFORMS"))]:
        monkeypatch.delenv(name)
    return lambda: {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("TPU_", "JAX_PLATFORMS"))
    }


def test_without_a_tpu(environment, monkeypatch, tmp_path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "vfio").mkdir()
    (tmp_path / "dev" / "vfio" / "vfio").touch()
    for number, (vendor, kind) in enumerate([("0x8086", "0x088000"), ("0x1ae0", "0x020000")]):
        device = tmp_path / "sys/bus/pci/devices" / str(number)
        device.mkdir(parents=True)
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    quiet_libtpu(tmp_path)
    assert environment() == ENVIRONMENT


@pytest.mark.parametrize("sign", ["dev/accel0", "dev/vfio/0", "sys/bus/pci/devices/7/vendor"])
def test_with_a_tpu_nothing_is_set(environment, tmp_path, sign):
    (tmp_path / sign).parent.mkdir(parents=True)
    (tmp_path / sign).write_text("0x1ae0\n")
    (tmp_path / sign).with_name("class").write_text("0x088000\n")
    quiet_libtpu(tmp_path)
    assert environment() == {}


@pytest.mark.parametrize("given", [{"TPU_WORKER_ID": "0"}, {"JAX_PLATFORMS": "tpu,cpu"}])
def test_variables_that_ask_for_a_tpu_stay(environment, monkeypatch, tmp_path, given):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    quiet_libtpu(tmp_path)
    assert environment() == given
