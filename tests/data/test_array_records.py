"""Where array_record is not installed, the package imports, and tokens are an error that names
it."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from bitdance_jax.data import array_records, token_shards
from bitdance_jax.data.token_shards import Shard
from bitdance_jax.errors import UserError


def without_array_record(monkeypatch):
    """The stand-in for its classes."""
    for name in ("array_record_data_source", "array_record_module"):
        monkeypatch.setitem(sys.modules, f"array_record.python.{name}", None)
    return runpy.run_path(array_records.__file__)["ArrayRecordReader"]


def test_tokens_name_the_missing_package(tmp_path, monkeypatch):
    monkeypatch.setattr(token_shards, "ArrayRecordReader", without_array_record(monkeypatch))
    path = tmp_path / "tokens-00000-of-00001.array_record"
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"^(?!.*damaged).*array_record.*Windows"):
        Shard(Path(path), "0" * 16, 0, range(1)).check()


@pytest.mark.slow
def test_training_imports_without_it():
    code = """
import sys
import grain  # which does without on Windows alone
sys.modules |= {name: None for name in sys.modules if name.startswith("array_record")}
import bitdance_jax.train.class_conditional_training, bitdance_jax.train.tokenizer_training
"""
    subprocess.run([sys.executable, "-c", code], check=True)
