"""The loss, against explicit distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_lm.training.loss import chunked_loss_and_totals, loss_and_totals


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


class TestInChunks:
    @pytest.mark.parametrize("chunks", [1, 2, 6])
    def test_values_and_gradients_are_those_of_the_whole(self, chunks):
        rng = np.random.default_rng(0)
        x, kernel = rng.normal(size=(2, 6, 5)).astype(np.float32), rng.normal(size=(5, 7)).astype(np.float32)
        targets, weights = rng.integers(0, 7, (2, 6)), (rng.random((2, 6)) < 0.7).astype(np.float32)

        def whole(kernel, x):
            loss, totals = loss_and_totals(x @ kernel, targets, weights, 0.1)
            return 3 * loss, totals

        def in_chunks(kernel, x):
            loss, totals = chunked_loss_and_totals(
                lambda kernel, x: x @ kernel, kernel, x, targets, weights, label_smoothing=0.1, chunks=chunks
            )
            return 3 * loss, totals

        results = [jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(kernel, x) for f in (whole, in_chunks)]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole(kernel, x), in_chunks(kernel, x))

    def test_logits_never_lie_together(self):
        """In the compiled gradient, memory beyond arguments and results is a part of what [B, T, V] would take."""
        size = {"x": (4, 64, 16), "kernel": (16, 4096)}
        targets, weights = np.zeros((4, 64), np.int32), np.ones((4, 64), np.float32)

        def memory(chunks):
            def loss(kernel, x):
                return chunked_loss_and_totals(
                    lambda kernel, x: x @ kernel, kernel, x, targets, weights, label_smoothing=0.0, chunks=chunks
                )[0]

            compiled = jax.jit(jax.grad(loss, (0, 1))).lower(jnp.ones(size["kernel"]), jnp.ones(size["x"])).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        assert memory(16) < 0.5 * 4 * 64 * 4096 * 4 < memory(1)
