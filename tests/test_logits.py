"""Logits in chunks; test_loss.py and test_language_model.py have what is made of them."""

import types

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


def test_where_all_are_alike_none_is_likeliest():
    """As before the first step of networks whose logits begin at zero; nor is what is no number."""
    for values in (np.zeros((5, 9), np.float32), np.full((5, 9), np.nan, np.float32)):
        _, likeliest = logits.score(values, np.arange(5))
        assert not np.any(likeliest)


def test_the_gradient_of_what_is_picked_scatters_nothing():
    rng = np.random.default_rng(0)
    values, targets = rng.normal(size=(2, 3, 7)).astype(np.float32), rng.integers(0, 7, (2, 3))
    weights = rng.normal(size=(2, 3)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda values: (logits.pick(values, targets) * weights).sum()))
    np.testing.assert_array_equal(gradient(values), np.eye(7, dtype=np.float32)[targets] * weights[..., None])
    assert "scatter" not in gradient.lower(values).as_text()


def test_a_gpu_makes_more_at_a_time(monkeypatch):
    def have(memory):
        stats = None if memory is None else {"bytes_limit": memory}
        device = types.SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
        monkeypatch.setattr(jax, "devices", lambda: [device])
        monkeypatch.setattr(jax, "local_devices", lambda: [device])

    gib = 2**30
    for memory, expected in ((60 * gib, 60 * 2**24), (140 * gib, 2**30), (gib, logits.AT_ONCE), (None, logits.AT_ONCE)):
        have(memory)
        assert logits.at_once() == expected
    have(64 * gib)
    with monkeypatch.context() as patched:
        patched.setattr(jax, "local_devices", lambda: [])  # it is compiled for, and not at hand
        assert logits.at_once() == logits.AT_ONCE
    assert logits.chunks_of(32, 1024, 32_000) == 1
    assert logits.chunks_of(128, 1024, 32_000) == 4
    monkeypatch.setattr(jax, "process_count", lambda: 2)  # whose memory may differ
    assert logits.at_once() == logits.AT_ONCE


@pytest.mark.parametrize(("rows", "length", "vocab_size"), [(1, 128, 900), (64, 256, 32_000), (32, 127, 32_000)])
def test_number_of_chunks(monkeypatch, rows, length, vocab_size):
    monkeypatch.setattr(logits, "at_once", lambda: logits.AT_ONCE)
    chunks = logits.chunks_of(rows, length, vocab_size)
    assert length % chunks == 0
    assert rows * length // chunks * vocab_size <= logits.AT_ONCE


def test_chunks_are_of_positions_and_come_together_again():
    array = np.arange(2 * 6 * 5).reshape(2, 6, 5)
    [chunks] = logits.cut([array], 3)
    np.testing.assert_array_equal(chunks[1], array[:, 2:4])
    jax.tree.map(np.testing.assert_array_equal, logits.join(chunks), array)
