"""Batches of packed rows: the same on any number of processes, and after resuming."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from row_documents import BLOCK, LENGTHS, document

from bitdance_jax.data.documents import Image
from bitdance_jax.data.packed_batches import (
    Documented,
    Note,
    PackedBatches,
    Prepared,
    SampleReader,
)
from bitdance_jax.errors import FileError, ResourceError


ROWS = 4
BYTES = 1


class Samples:
    """Sample n is n; some are read after later ones."""

    def draw(self, n: int) -> int:
        return n


def pixels_of(number: int, patches: int) -> np.ndarray:
    """Pixels whose encoding `encode` makes; side by side, a patch a column."""
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (1, patches * BLOCK, 3), np.uint8)


def encode(images: list[np.ndarray]) -> list[np.ndarray]:
    return [image[..., :1] for image in images]


def with_pixels(number: int) -> Prepared:
    made = document(number)
    if made is None:
        return Prepared(None, damaged=(f"{number} is damaged",), notes=(Note("odd", "a note"),))
    pixels = pixels_of(number, len(made.visual))
    return Prepared(made.with_images([OneRow(None, (0, 0), pixels=pixels)]))


def with_bits(number: int) -> Prepared:
    made = with_pixels(number).document
    if made is None:
        return Prepared(None)
    return Prepared(made.with_images([made.images[0].encoded(made.images[0].pixels[..., :1], 1)]))


class OneRow(Image):
    """An image of one row of tokens, in raster order whatever the patch."""

    def encoded(self, codes: np.ndarray, patch_side: int) -> Image:
        return dataclasses.replace(self, bits=codes[0], pixels=None)


def batches(rows=range(ROWS), to_document=with_pixels, ahead=1, workers=0):
    return PackedBatches(
        SampleReader(Documented(Samples(), to_document), workers),
        encode,
        batch_size=ROWS,
        rows=np.array(rows),
        lengths=LENGTHS,
        tokens_per_step=BLOCK,
        num_bytes=BYTES,
        ahead=ahead,
    )


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_rows_are_the_same_in_any_process_and_from_tokens():
    complete = batches()
    parts = [batches([0, 3]), batches([1, 2], with_bits, ahead=0)]
    for _ in range(5):
        expected = next(complete)
        assert expected["tokens"].shape == (ROWS, LENGTHS.row)
        for part, rows in zip(parts, ([0, 3], [1, 2]), strict=True):
            assert_same(next(part), {name: array[rows] for name, array in expected.items()})
    for each in (complete, *parts):
        each.close()


def test_a_state_continues_with_waiting_documents_in_other_processes():
    before = batches()
    for _ in range(6):
        next(before)
    saved = json.loads(json.dumps(before.get_state()))
    assert any(row["waiting"] for row in saved["rows"].values())
    parts = [batches([0]), batches([1, 2, 3])]
    for part in parts:
        next(part)  # reads ahead from the start, which is dropped
        part.set_state(saved)
    for _ in range(4):
        expected = next(before)
        assert_same(next(parts[0]), {name: array[:1] for name, array in expected.items()})
        assert_same(next(parts[1]), {name: array[1:] for name, array in expected.items()})
    after = before.get_state()["rows"]
    assert parts[0].get_state()["rows"] | parts[1].get_state()["rows"] == after
    for each in (before, *parts):
        each.close()


def test_rows_have_different_samples():
    source = batches()
    seen = [next(source) for _ in range(3)]
    source.close()
    numbers = [
        set(np.unique(batch["tokens"][row][batch["documents"][row] >= 0]))
        for batch in seen
        for row in range(ROWS)
    ]
    assert sum(map(len, numbers)) == len(set.union(*numbers))


def test_what_is_not_used_is_reported_once(capsys):
    source = batches([0])
    for _ in range(8):
        next(source)
    source.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines.count("note: a note (odd: 1)") == 1
    assert sum("is damaged; the next one replaces it" in line for line in lines) > 1


def test_data_of_which_nothing_fits_is_an_error():
    source = batches(to_document=lambda number: Prepared(None))
    with pytest.raises(FileError, match="1000 samples in a row were skipped"):
        next(source)
    source.close()


@pytest.mark.slow
def test_worker_processes_make_the_same_documents():
    complete, other = batches(), batches(workers=1)
    for _ in range(2):
        assert_same(next(complete), next(other))
    complete.close()
    other.close()


LARGE_SAMPLES = """
import signal
import sys
from bitdance_jax.data.packed_batches import SampleReader

class Samples:
    def __init__(self):
        self.content = bytes(2**20)  # More than a pipe holds.
    def draw(self, n):
        return n

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: None)
    print("ready", flush=True)
    reader = SampleReader(Samples(), workers=1)
    print([reader.read(n) for n in range(3)], flush=True)
    sys.stdin.read()
    reader.close()
"""


@pytest.mark.slow
def test_workers_outlive_signals_while_they_start_and_run(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(LARGE_SAMPLES)
    process = subprocess.Popen(
        [sys.executable, program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n"
    over = threading.Event()

    def send_signals() -> None:
        for _ in range(6000):
            if over.wait(0.01):
                return
            os.killpg(process.pid, signal.SIGTERM)
        process.kill()

    sender = threading.Thread(target=send_signals)
    sender.start()
    assert process.stdout.readline() == "[0, 1, 2]\n"
    over.set()
    sender.join()
    process.communicate(timeout=60)
    assert process.returncode == 0


class Killed(Samples):
    def draw(self, n: int) -> int:
        os._exit(1)


def test_a_worker_that_ends_is_one_line():
    reader = SampleReader(Killed(), workers=1)
    with pytest.raises(ResourceError, match="worker process of the data loader ended"):
        reader.read(0)
    reader.close()
