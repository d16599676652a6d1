"""Logits in chunks; test_loss.py and test_language_model.py have what is made of them."""

import jax
import numpy as np
import pytest

from transformer_lm import logits


def test_scores_against_explicit_distributions():
    rng = np.random.default_rng(0)
    values, targets = rng.normal(size=(2, 3, 7)).astype(np.float32) * 5, rng.integers(0, 7, (2, 3))
    probabilities = np.exp(values.astype(np.float64))
    probabilities /= probabilities.sum(axis=-1, keepdims=True)
    expected = np.take_along_axis(probabilities, targets[..., None], axis=-1)[..., 0]
    log_probs, likeliest = logits.score(values, targets)
    np.testing.assert_allclose(np.exp(log_probs), expected, rtol=1e-5)
    np.testing.assert_array_equal(likeliest, probabilities.argmax(axis=-1) == targets)


@pytest.mark.parametrize(("rows", "length", "vocab_size"), [(1, 128, 900), (64, 256, 32_000), (32, 127, 32_000)])
def test_number_of_chunks(rows, length, vocab_size):
    chunks = logits.chunks_of(rows, length, vocab_size)
    assert length % chunks == 0
    assert rows * length // chunks * vocab_size <= logits.AT_ONCE


def test_chunks_are_of_positions_and_come_together_again():
    array = np.arange(2 * 6 * 5).reshape(2, 6, 5)
    [chunks] = logits.cut([array], 3)
    np.testing.assert_array_equal(chunks[1], array[:, 2:4])
    jax.tree.map(np.testing.assert_array_equal, logits.join(chunks), array)
