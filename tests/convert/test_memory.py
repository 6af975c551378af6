"""Peak memory of converting a full-size model: the layers are read and written one stacked array at a time."""

import io
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import golden_models
import numpy as np
import pytest
import torch_writer
from torch_writer import Tensor


# The resident memory's peak by Linux's own count: getrusage would take over the parent's, this process's, peak.
CONVERT = """
import re, sys
from bitdance_jax.convert.convert import convert
convert(sys.argv[1], sys.argv[2])
print("peak", re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""

RANDOM = np.random.default_rng(0).integers(0, 255, 2**24, np.uint8).tobytes()
ZEROS = bytes(2**24)


class SparseFile(io.FileIO):
    """Leaves a hole where zeros are written."""

    def write(self, data) -> int:
        if data is not ZEROS:
            return super().write(data)
        self.seek(len(data), io.SEEK_CUR)
        return len(data)


def write_full_size(path: Path, shapes: dict[str, list[int]]) -> None:
    """A released file of these shapes, float32: the transformer's numbers do not compress, the tokenizer's are zeros."""
    sizes = {key: int(np.prod(shape)) for key, shape in shapes.items()}
    strides = {key: [int(np.prod(shape[i + 1 :])) for i in range(len(shape))] for key, shape in shapes.items()}
    state = {
        key: Tensor("float32", str(i), sizes[key], 0, tuple(shape), tuple(strides[key])) for i, (key, shape) in enumerate(shapes.items())
    }
    with SparseFile(path, "w") as raw, zipfile.ZipFile(raw, "w") as file:
        file.writestr("full/data.pkl", torch_writer.pickle({"ema": state, "model": state, "args": {}}))
        for i, key in enumerate(shapes):
            block, left = ZEROS if key.startswith("vae.") else RANDOM, 4 * sizes[key]
            with file.open(f"full/data/{i}", "w") as record:
                for _ in range(left // len(block)):
                    record.write(block)
                record.write(block[: left % len(block)])


@pytest.fixture
def folder(tmp_path):
    yield tmp_path
    shutil.rmtree(tmp_path)  # pytest would keep its gigabytes


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of resident memory from /proc")
def test_peak_memory_of_a_full_size_model(folder):
    shapes = golden_models.manifest()["BitDance_B_1x"]
    write_full_size(folder / "full.pt", shapes)
    run = subprocess.run([sys.executable, "-c", CONVERT, folder / "full.pt", folder / "model"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr

    # The SwiGLU's first weight of all 24 layers.
    largest = 24 * 4 * np.prod(shapes["layers.0.feed_forward.w1.weight"])
    peak = 1024 * int(run.stdout.rpartition("peak ")[2])
    print(f"peak {peak / 1e9:.2f} GB; largest stacked tensor {largest / 1e9:.2f} GB")
    assert peak < 1.3 * largest + 1e9

    header = json.loads((folder / "model" / "config.json").read_text())
    assert header["metadata"]["name"] == "BitDance_B_1x"
    assert sum(size for size, _ in header["files"].values()) > 0.85e9  # the transformer's numbers were not lost on the way
