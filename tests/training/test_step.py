"""A training step: whose gradient it is, and that it does not depend on the devices."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from conftest import batch_of, init

from transformer_lm.training import optimizers
from transformer_lm.training.state import state_of
from transformer_lm.training.step import make_eval_step, make_train_step

ADAM = optimizers.OptimizerConfig(learning_rate=0.01, warmup_steps=10, weight_decay=0.1)
DESCENT = optax.sgd(1.0)


@functools.cache
def jitted_step(model, optimizer, smoothing):
    return jax.jit(make_train_step(model, optimizer, smoothing))


def first_step(model, params, batch, smoothing=0.0):
    """State and metrics after one step of plain gradient descent with rate 1: the change is the gradient."""
    return jitted_step(model, DESCENT, smoothing)(state_of(params, DESCENT), batch, jax.random.key(0))


def stacked(*batches):
    return jax.tree.map(lambda *rows: np.concatenate(rows), *batches)


class TestTrainStep:
    @pytest.fixture
    def quiet(self, tiny):
        return dataclasses.replace(tiny, dropout_rate=0.0, attention_dropout_rate=0.0)

    def test_gradient_is_weighted_by_token(self, quiet):
        """A batch of a long and a short row has the gradient of all its tokens' mean, not of the rows' means."""
        params = init(quiet)
        rows = [batch_of(texts, 8) for texts in ([[5, 6, 7, 8, 9, 10, 11]], [[12]], [])]
        pairs = [stacked(rows[0], rows[2]), stacked(rows[1], rows[2]), stacked(rows[0], rows[1])]
        states = [first_step(quiet, params, batch)[0] for batch in pairs]
        long, short, mean = (jax.tree.map(lambda a, b: np.asarray(b - a), params, state.params) for state in states)
        expected = jax.tree.map(lambda a, b: (8 * a + 2 * b) / 10, long, short)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), mean, expected)

    def test_padding_changes_nothing(self, quiet):
        """Neither at a row's end nor as a row."""
        params, batches = init(quiet), [batch_of([[5, 6, 7]], 4), stacked(batch_of([[5, 6, 7]], 8), batch_of([], 8))]
        bare, padded = (first_step(quiet, params, batch) for batch in batches)
        assert float(bare[1]["loss"]) == pytest.approx(float(padded[1]["loss"]), rel=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), bare[0].params, padded[0].params)

    def test_label_smoothing_is_applied(self, quiet):
        params, batch = init(quiet), batch_of([[5, 6, 7]], 4)
        plain, smoothed = (first_step(quiet, params, batch, smoothing) for smoothing in (0.0, 0.2))
        assert float(plain[1]["loss"]) == pytest.approx(float(smoothed[1]["loss"]))  # what is reported stays comparable
        kernels = [np.asarray(state.params["logits"]["kernel"]) for state, _ in (plain, smoothed)]
        assert np.max(np.abs(kernels[0] - kernels[1])) > 1e-3

    def test_learns_by_heart(self, tiny):
        batch = batch_of([[5, 6, 7, 8], [9, 8, 7]], 10)
        optimizer, key = optimizers.make_optimizer(ADAM), jax.random.key(1)
        step = jitted_step(tiny, optimizer, 0.0)
        state = state_of(init(tiny), optimizer)
        for _ in range(200):
            state, _ = step(state, batch, key)
        assert int(state.step) == 200
        assert float(state.totals["tokens"]) == 200 * 9
        totals = jax.jit(make_eval_step(tiny))(state.params, batch)
        assert float(totals["loss"]) / 9 < 0.2
