"""Packing: nothing is lost, little is wasted, and a row is read back as it was written."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_lm.data import packing
from transformer_lm.tokenizer import EOS_ID

TEXTS = st.lists(st.lists(st.integers(3, 999), max_size=70), max_size=60)


def as_texts(texts):
    return [np.array([*text, EOS_ID]) for text in texts]


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.integers(2, 40))
def test_every_token_once_in_order(texts, row_length):
    """Cut where texts end and at row ends, the rows hold exactly the pieces of the texts."""
    texts = as_texts(texts)
    rows = list(packing.pack(texts, row_length, np.dtype(np.uint16)))
    assert all(row.shape == (row_length,) and row.dtype == np.uint16 for row in rows)
    tokens = np.concatenate([row[row != 65535] for row in rows]) if rows else np.array([])
    np.testing.assert_array_equal(np.sort(tokens), np.sort(np.concatenate(texts)) if texts else [])
    # Every whole text that fits a row, and is found whole in one, accounts for itself; the others are in pieces.
    pieces = {tuple(piece) for row in rows for piece in split(row[row != 65535])}
    for text in texts:
        assert tuple(text) in pieces or can_be_put_together(list(text), pieces)


def split(tokens):
    """Segments of a row, each with its closing EOS where it has one."""
    return [part for part in np.split(tokens.tolist(), np.flatnonzero(tokens == EOS_ID) + 1) if len(part)]


def can_be_put_together(text, pieces):
    return not text or any(
        tuple(text[:n]) in pieces and can_be_put_together(text[n:], pieces) for n in range(len(text), 0, -1)
    )


@pytest.mark.parametrize("lengths", [(1, 30), (20, 300), (90, 110), (128, 128), (129, 129), (2000, 9000)])
def test_padding_stays_below_its_bound(lengths):
    """Whatever the lengths are; the rows still open at the end are left out."""
    rng = np.random.default_rng(0)
    texts = (np.full(n, 7) for n in rng.integers(lengths[0], lengths[1] + 1, size=200_000 // lengths[1] + 500))
    rows = np.stack(list(packing.pack(texts, 128, np.dtype(np.uint16))))[: -packing.OPEN_ROWS]
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
def test_unpack_inverts_pack(texts):
    """The targets of a row's segments are its texts; inputs are the targets shifted right behind id 0."""
    rows = list(packing.pack(as_texts(texts), 40, np.dtype(np.uint16)))
    if not rows:
        return
    batch = packing.unpack(np.stack(rows))
    for i, row in enumerate(rows):
        for number, text in enumerate(split(row[row != 65535]), 1):
            here = batch["segments"][i] == number
            np.testing.assert_array_equal(batch["targets"][i][here], text)
            np.testing.assert_array_equal(batch["inputs"][i][here], [0, *text[:-1]])
            np.testing.assert_array_equal(batch["positions"][i][here], np.arange(len(text)))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(8000, "uint16"), (65535, "uint16"), (65536, "uint32")])
def test_row_dtype_leaves_room_for_padding(vocab_size, dtype):
    assert packing.row_dtype(vocab_size) == dtype
    assert packing.padding_id(packing.row_dtype(vocab_size)) >= vocab_size
