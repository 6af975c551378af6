"""Files with a few bytes changed at random are read, or refused at once with one line."""

import random
import time

import numpy as np
import pytest
import torch_writer
from golden_models import GOLDEN

from bitdance_jax.convert import legacy_torch_file, safetensors_file, torch_file
from bitdance_jax.errors import UserError
from bitdance_jax.evaluate import prompt_lists
from bitdance_jax.io.lazy_array import LazyArray


ARRAYS = {"a": np.arange(4, dtype=np.float32), "b": np.zeros((2, 3), np.float32)}
EXTREMES = [byte * count for byte in (b"\xff", b"\0", b"\x80", b"[", b'"') for count in (1, 4, 8)]


def torch_zip(path):
    return torch_writer.save(
        path,
        {
            "ema": ARRAYS,
            "args": torch_writer.Call("argparse.Namespace", (), {"dim": 64, "lr": 1e-4}),
        },
    )


def legacy(path):
    path.write_bytes((GOLDEN / "evaluation" / "legacy.pth").read_bytes())
    return path


def tensors(path):
    lazy = {
        key: LazyArray(array.shape, array.dtype, lambda array=array: array)
        for key, array in ARRAYS.items()
    }
    safetensors_file.save(path, lazy, {"format": "pt"})
    return path


def prompts(path):
    path.write_bytes(b'{"tag": "two", "include": [{"count": 2}], "prompt": "a cat"}\n' * 2)
    return path


def read_arrays(load):
    def read(path):
        pending = [load(path)]
        while pending:
            value = pending.pop()
            if isinstance(value, dict):
                pending += value.values()
            elif hasattr(value, "read"):
                value.read()

    return read


def mutate(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        position = rng.randrange(len(out) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            out[position : position + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            extreme = rng.choice(EXTREMES)
            out[position : position + len(extreme)] = extreme
        elif kind == 2:
            del out[position : position + rng.choice([1, 4, 50])]
        elif kind == 3:
            start = rng.randrange(len(out) + 1)
            out[position:position] = out[start : start + 30]
        elif rng.random() < 0.3:
            del out[position:]
    return bytes(out)


@pytest.mark.parametrize(
    ("write", "read"),
    [
        (torch_zip, read_arrays(torch_file.load)),
        (legacy, read_arrays(legacy_torch_file.load)),
        (tensors, read_arrays(lambda path: safetensors_file.load(path).tensors)),
        (prompts, lambda path: prompt_lists.read_geneval(str(path))),
        (prompts, lambda path: prompt_lists.read_dpg(str(path))),
    ],
    ids=["torch", "legacy", "safetensors", "geneval", "dpg"],
)
def test_a_few_changed_bytes(tmp_path, write, read):
    rng = random.Random(0)
    path = write(tmp_path / "x.safetensors")
    original = path.read_bytes()
    slowest = 0.0
    for _ in range(300):
        path.write_bytes(mutate(original, rng))
        begin = time.process_time()
        try:
            read(path)
        except UserError as error:
            assert "x.safetensors" in str(error)
            assert "\n" not in str(error)
        slowest = max(slowest, time.process_time() - begin)
    assert slowest < 1
