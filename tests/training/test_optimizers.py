"""Schedules and optimizers against their formulas, written out in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import init
from test_models import MODERN

from transformer_lm.errors import UserError
from transformer_lm.training import optimizers


def config(**changes):
    return optimizers.OptimizerConfig(**{"learning_rate": 0.0016, "warmup_steps": 1000, "weight_decay": 0.1} | changes)


def test_schedule():
    schedule = optimizers.learning_rate_schedule(config())
    for step in (0, 1, 500, 999, 1000, 1001, 4000, 500_000):
        expected = 0.0016 * (step / 1000 if step < 1000 else np.sqrt(1000 / step))
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-5)


def test_warmup_stable_decay():
    schedule = optimizers.learning_rate_schedule(
        config(schedule="wsd", learning_rate=0.5, warmup_steps=4, num_train_steps=100, decay_share=0.2)
    )
    expected = {0: 0.125, 1: 0.25, 3: 0.5, 4: 0.5, 79: 0.5, 80: 0.5, 90: 0.25, 99: 0.025, 100: 0.0, 150: 0.0}
    assert {step: float(schedule(step)) for step in expected} == pytest.approx(expected)


def test_cosine():
    schedule = optimizers.learning_rate_schedule(
        config(schedule="cosine", learning_rate=2.0, warmup_steps=10, num_train_steps=110)
    )
    for step in (10, 35, 60, 85, 110):
        assert float(schedule(step)) == pytest.approx(1 + np.cos(np.pi * (step - 10) / 100), abs=1e-6)
    assert float(schedule(4)) == pytest.approx(1.0)


def test_adamw():
    """Ten steps of AdamW (Loshchilov and Hutter 2019, algorithm 2) with b1 0.9, b2 0.98, eps 1e-9."""
    settings = config(learning_rate=0.01, warmup_steps=4)
    optimizer = optimizers.make_optimizer(settings)
    schedule = optimizers.learning_rate_schedule(settings)
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)}
    weights, m, v = np.array(params["kernel"], np.float64), 0.0, 0.0
    state = optimizer.init(params)
    for step in range(10):
        grad = rng.normal(size=(3, 4)).astype(np.float32)
        updates, state = optimizer.update({"kernel": jnp.asarray(grad)}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        m, v = 0.9 * m + 0.1 * grad, 0.98 * v + 0.02 * grad.astype(np.float64) ** 2
        adam = m / (1 - 0.9 ** (step + 1)) / (np.sqrt(v / (1 - 0.98 ** (step + 1))) + 1e-9)
        weights = weights - float(schedule(step)) * (adam + 0.1 * weights)
    np.testing.assert_allclose(params["kernel"], weights, rtol=1e-5)


def test_muon(tiny):
    """Three steps, with the orthogonal factor by a decomposition; of all else those of Adam, without decay."""
    settings = config(
        optimizer="muon", learning_rate=0.02, embedding_learning_rate=0.3, head_learning_rate=0.01, weight_decay=0.5,
        schedule="wsd", warmup_steps=1, num_train_steps=3, decay_share=0.5,
    )  # fmt: skip
    factors = [1.0, 1.0, 2 / 3]
    network = dataclasses.replace(tiny, **MODERN)
    params = start = init(network)
    optimizer = optimizers.make_optimizer(settings)
    state, momentum = optimizer.init(params), 0.0
    rng = np.random.default_rng(0)
    steps = [jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params) for _ in range(3)]
    kernel = np.array(params["blocks"]["attention"]["out"]["kernel"], np.float64).reshape(2, 16, 16)
    for grads, factor in zip(steps, factors, strict=True):
        updates, state = jax.jit(optimizer.update)(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        grad = np.array(grads["blocks"]["attention"]["out"]["kernel"]).reshape(2, 16, 16)
        momentum = 0.95 * momentum + grad
        left, _, right = np.linalg.svd(grad + 0.95 * momentum)
        kernel = kernel - 0.02 * factor * (left @ right + 0.5 * kernel)
    found = np.asarray(params["blocks"]["attention"]["out"]["kernel"]).reshape(2, 16, 16)
    # The polynomials bring singular values to 1 but for a fifth: the difference is small beside the way.
    way = kernel - np.asarray(start["blocks"]["attention"]["out"]["kernel"]).reshape(2, 16, 16)
    assert np.linalg.norm(found - kernel) < 0.2 * np.linalg.norm(way)
    adam = optax.adam(lambda step: jnp.asarray(factors)[step], 0.9, 0.98, 1e-9)
    for rate, path in ((0.3, ("embed", "embedding")), (0.01, ("logits", "kernel")), (0.01, ("norm", "scale"))):
        value = begun = start[path[0]][path[1]]
        adam_state = adam.init(value)
        for grads in steps:
            update, adam_state = adam.update(grads[path[0]][path[1]], adam_state)
            value = value + rate * update
        np.testing.assert_allclose(params[path[0]][path[1]] - begun, value - begun, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [{"learning_rate": 0.0}, {"warmup_steps": 0}, {"weight_decay": -0.1}, {"optimizer": "sgd"}, {"schedule": "step"}],
)
def test_impossible_values(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        config(**wrong)
