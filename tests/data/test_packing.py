"""Packing: nothing is lost, little is wasted, and a row is read back as it was written."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_lm.data import packing
from transformer_lm.tokenizer import EOS_ID, START_ID

TEXTS = st.lists(st.lists(st.integers(3, 999), max_size=70), max_size=60)


def as_texts(texts):
    """[n, 3] of each text: ids and EOS, and as many characters and bytes as the id's last digits say."""
    ids = [np.array([*text, EOS_ID]) for text in texts]
    return [np.stack([tokens, tokens % 10, tokens % 100], axis=1) for tokens in ids]


def segments_of(row):
    """(token before, ids) of each segment of a row."""
    ids = row.ids[row.ids != 65535]
    cuts = [0, *(np.flatnonzero(ids == EOS_ID) + 1), len(ids)]
    before = dict(row.continued)
    return [
        (before.get(start, START_ID), ids[start:end].tolist()) for start, end in itertools.pairwise(cuts) if end > start
    ]


@settings(max_examples=100, deadline=None)
@given(TEXTS, st.integers(2, 40))
def test_a_segment_is_a_piece_of_one_text(texts, row_length):
    """Pieces, put together by the tokens before them, are the texts: none is lost, and no two are glued together.

    The texts' tokens are all different, so that a piece can belong to one text alone.
    """
    numbers = itertools.count(3)
    texts = [[next(numbers) for _ in text] for text in texts]
    rows = list(packing.pack(as_texts(texts), row_length, np.dtype(np.uint16)))
    assert all(row.ids.shape == (row_length,) and row.ids.dtype == np.uint16 for row in rows)
    pieces = collections.defaultdict(list)  # by the token before
    for row in rows:
        for before, piece in segments_of(row):
            pieces[before].append(piece)
    found = []
    for piece in pieces.pop(START_ID, []):
        while piece[-1] != EOS_ID:
            piece = piece + pieces[piece[-1]].pop()
        found.append(piece)
    assert sorted(found) == sorted([*text, EOS_ID] for text in texts)
    assert not any(pieces.values())


@settings(max_examples=30, deadline=None)
@given(TEXTS, st.integers(2, 40))
def test_counts_of_rows(texts, row_length):
    """Each row knows the characters and bytes of its own tokens."""
    for row in packing.pack(as_texts(texts), row_length, np.dtype(np.uint16)):
        ids = row.ids[row.ids != 65535].astype(int)
        assert (row.characters, row.bytes) == (np.sum(ids % 10), np.sum(ids % 100))


def test_documents_of_one_character_each_are_not_glued():
    """3000 documents, each of another token repeated 20 to 900 times: no segment holds two tokens."""
    rng = np.random.default_rng(0)
    texts = as_texts([[3 + number] * n for number, n in enumerate(rng.integers(20, 901, 3000))])
    rows = list(packing.pack(texts, 128, np.dtype(np.uint16)))
    batch = packing.read_records(
        np.stack([np.frombuffer(row.record(), np.uint8) for row in rows]), np.dtype(np.uint16)
    )  # fmt: skip
    for inputs, targets, segments in zip(batch["inputs"], batch["targets"], batch["segments"], strict=True):
        for number in range(1, segments.max() + 1):
            here = segments == number
            tokens = set(targets[here].tolist()) - {EOS_ID}
            assert len(tokens) <= 1
            assert set(inputs[here].tolist()) <= tokens | {START_ID} if tokens else True
    starts = (batch["positions"] == 0) & (batch["segments"] > 0)
    assert np.sum(batch["inputs"][starts] == START_ID) == 3000  # every document begins once, wherever it was cut


@pytest.mark.parametrize("lengths", [(1, 30), (20, 300), (90, 110), (128, 128), (129, 129), (2000, 9000)])
def test_padding_stays_below_its_bound(lengths):
    """Whatever the lengths are; the rows still open at the end are left out."""
    rng = np.random.default_rng(0)
    texts = (np.full((n, 3), 7) for n in rng.integers(lengths[0], lengths[1] + 1, size=200_000 // lengths[1] + 500))
    rows = np.stack([row.ids for row in packing.pack(texts, 128, np.dtype(np.uint16))])[: -packing.OPEN_ROWS]
    assert np.mean(rows == 65535) <= 1 / packing.MAX_PADDING


def test_unpack_by_hand():
    rows = np.array([[5, 6, EOS_ID, 7, EOS_ID, 65535], [8, 9, 8, 9, 8, 9]], np.uint16)
    batch = packing.unpack(rows)
    np.testing.assert_array_equal(batch["targets"], [[5, 6, 2, 7, 2, 0], [8, 9, 8, 9, 8, 9]])
    np.testing.assert_array_equal(batch["inputs"][:, :5], [[0, 5, 6, 0, 7], [0, 8, 9, 8, 9]])
    np.testing.assert_array_equal(batch["positions"][:, :5], [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
    np.testing.assert_array_equal(batch["segments"], [[1, 1, 1, 2, 2, 0], [1] * 6])


@settings(max_examples=60, deadline=None)
@given(TEXTS)
def test_records_are_read_as_they_were_packed(texts):
    """The targets of a row's segments are pieces of texts; inputs are the targets shifted right."""
    rows = list(packing.pack(as_texts(texts), 40, np.dtype(np.uint16)))
    if not rows:
        return
    records = np.stack([np.frombuffer(row.record(), np.uint8) for row in rows])
    assert records.shape == (len(rows), packing.HEADER.itemsize + 40 * 2)
    batch = packing.read_records(records, np.dtype(np.uint16))
    for i, row in enumerate(rows):
        assert (batch["characters"][i], batch["bytes"][i]) == (row.characters, row.bytes)
        for number, (before, piece) in enumerate(segments_of(row), 1):
            here = batch["segments"][i] == number
            np.testing.assert_array_equal(batch["targets"][i][here], piece)
            np.testing.assert_array_equal(batch["inputs"][i][here], [before, *piece[:-1]])
            np.testing.assert_array_equal(batch["positions"][i][here], np.arange(len(piece)))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(8000, "uint16"), (65535, "uint16"), (65536, "uint32")])
def test_row_dtype_leaves_room_for_padding(vocab_size, dtype):
    assert packing.row_dtype(vocab_size) == dtype
    assert packing.padding_id(packing.row_dtype(vocab_size)) >= vocab_size
