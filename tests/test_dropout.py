"""Dropout's masks: as often as wanted, independent, and each row's its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_lm import dropout


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_statistics(rate):
    x = jnp.ones((400, 500))
    kept = np.asarray(dropout.dropout(x, rate, dropout.row_keys(jax.random.key(1), jnp.arange(400))))
    assert set(np.unique(kept)) == {0.0, np.float32(1 / (1 - rate))}
    deviation = np.sqrt(rate * (1 - rate) / x.size)
    assert np.mean(kept == 0) == pytest.approx(rate, abs=5 * deviation)
    dropped = (kept == 0) - rate
    for shifted in (np.roll(dropped, 1, axis=0), np.roll(dropped, 1, axis=1), np.roll(dropped, 256, axis=1)):
        assert abs(np.mean(dropped * shifted)) < 5 * rate * (1 - rate) / np.sqrt(x.size)


def test_keys_are_independent():
    keys = jax.random.split(jax.random.key(0), 8)
    masks = np.asarray(dropout.dropout(jnp.ones((8, 100_000)), 0.5, keys)) == 0
    for i in range(8):
        for j in range(i):
            assert np.mean(masks[i] == masks[j]) == pytest.approx(0.5, abs=0.01)


def test_no_keys_no_dropout():
    x = jnp.ones((2, 3))
    assert dropout.dropout(x, 0.5, None) is x
    assert dropout.split(None, 3) == [None] * 3
