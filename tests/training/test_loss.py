"""The loss, against explicit distributions."""

import jax.numpy as jnp
import numpy as np
import pytest

from transformer_lm.training.loss import loss_and_totals


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


class TestLoss:
    @pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
    def test_against_explicit_distributions(self, smoothing):
        """Kullback-Leibler divergence from the smoothed target distribution, written out."""
        rng = np.random.default_rng(0)
        logits = rng.normal(size=(2, 3, 7)).astype(np.float32) * 3
        targets = rng.integers(0, 7, (2, 3))
        weights = np.array([[1, 1, 0], [1, 0, 0]], np.float32)
        wanted = np.full((2, 3, 7), smoothing / 6)
        np.put_along_axis(wanted, targets[..., None], 1 - smoothing, axis=-1)
        entropy = -np.sum(wanted * np.log(np.maximum(wanted, 1e-30)), axis=-1)
        smoothed = -np.sum(wanted * log_softmax(logits), axis=-1) - entropy
        plain = -np.take_along_axis(log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        loss, totals = loss_and_totals(jnp.asarray(logits), jnp.asarray(targets), weights, smoothing)
        assert float(loss) == pytest.approx(np.sum(smoothed * weights), rel=1e-5)
        assert float(totals["loss"]) == pytest.approx(np.sum(plain * weights), rel=1e-5)
        assert float(totals["correct"]) == np.sum((logits.argmax(axis=-1) == targets) * weights)
        assert float(totals["tokens"]) == 3
