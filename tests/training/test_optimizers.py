"""Schedule and optimizer against their formulas, written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_lm.errors import UserError
from transformer_lm.training import optimizers


def config(**changes):
    return optimizers.OptimizerConfig(**{"learning_rate": 0.0016, "warmup_steps": 1000, "weight_decay": 0.1} | changes)


def test_schedule():
    schedule = optimizers.learning_rate_schedule(config())
    for step in (0, 1, 500, 999, 1000, 1001, 4000, 500_000):
        expected = 0.0016 * (step / 1000 if step < 1000 else np.sqrt(1000 / step))
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-5)


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


@pytest.mark.parametrize("wrong", [{"learning_rate": 0.0}, {"warmup_steps": 0}, {"weight_decay": -0.1}])
def test_impossible_values(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        config(**wrong)
