"""Rows of documents: full, without loss of any, and the same after resuming."""

import dataclasses
import json

import numpy as np
from row_documents import BLOCK, LENGTHS, document

from bitdance_jax.data.documents import Document
from bitdance_jax.data.packing import PADDING, PackingState, RowPacker, pack


def numbers(row: list[Document]) -> list[int]:
    return [int(each.tokens[0]) for each in row]


def test_rows_are_full_and_no_document_is_lost_or_read_twice():
    packer = RowPacker(document, LENGTHS)
    rows = [packer.next_row() for _ in range(50)]
    lengths = [sum(map(len, row)) for row in rows]
    assert max(lengths) <= LENGTHS.row
    assert np.mean(lengths) > 0.88 * LENGTHS.row
    seen = [number for row in rows for number in numbers(row)]
    assert len(seen) == len(set(seen))
    expected = {n for n in range(packer.state.next_document) if n % 7 != 6}
    assert set(seen) | set(packer.state.waiting) == expected
    assert len(packer.state.waiting) <= LENGTHS.buffer


def test_documents_that_are_too_long_are_skipped():
    """They would fill the buffer, and every row would be empty."""
    lengths = dataclasses.replace(LENGTHS, document=20, buffer=3)
    packer = RowPacker(document, lengths)
    rows = [packer.next_row() for _ in range(10)]
    assert all(rows)
    assert max(len(each) for row in rows for each in row) <= 20
    unlimited = dataclasses.replace(LENGTHS, target=30, row=40, document=10**6, buffer=3)
    packer = RowPacker(document, unlimited)
    rows = [packer.next_row() for _ in range(10)]
    assert all(rows)
    assert max(sum(map(len, row)) for row in rows) <= 40


def test_a_state_gives_the_same_rows():
    packer = RowPacker(document, LENGTHS)
    for _ in range(20):
        packer.next_row()
    saved = json.loads(json.dumps(dataclasses.asdict(packer.state)))
    assert saved["waiting"]
    again = RowPacker(document, LENGTHS, PackingState(**saved))
    for _ in range(20):
        assert numbers(again.next_row()) == numbers(packer.next_row())


def test_a_packed_row():
    documents = [document(1), document(2)]
    row = pack(documents, 130, patches=40, block=BLOCK, num_bytes=1)
    first, second = map(len, documents)
    end = first + second
    assert row["documents"].tolist() == [0] * first + [1] * second + [PADDING] * (130 - end)
    assert row["positions"][:end].tolist() == [*range(first), *range(second)]
    assert row["limits"].tolist() == list(range(1, 131))
    patches = [len(each.visual) for each in documents]
    assert row["generated"].sum() == sum(patches)
    np.testing.assert_array_equal(
        row["visual"][patches[0] : sum(patches)], documents[1].visual + first
    )
    assert (row["visual"][sum(patches) :] == 130).all()
