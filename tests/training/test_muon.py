"""Orthogonal updates, against decompositions."""

import jax
import numpy as np
import pytest

from transformer_lm.training import muon

orthogonalize = jax.jit(muon.orthogonalize)


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16), (48, 1)])
def test_all_singular_values_come_near_one(shape):
    """Those that differ by a factor of a hundred do, and the singular vectors stay."""
    rng = np.random.default_rng(0)
    left, _, right = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    matrix = left * np.geomspace(1, 0.01, min(shape)) @ right
    found = np.asarray(orthogonalize(matrix.astype(np.float32)))
    along = np.diag(left.T @ found @ right.T)
    assert along.min() > 0.7
    assert along.max() < 1.2
    np.testing.assert_allclose(found, left * along @ right, atol=1e-3)


def test_layers_do_not_know_of_each_other():
    """A layer's update is that of its own matrix [in, out], whose entries have a root mean square of 1 / sqrt(in)."""
    optimizer = muon.scale_by_muon()
    rng = np.random.default_rng(1)
    grads = {
        "query": {"kernel": rng.normal(size=(3, 16, 4, 8)).astype(np.float32)},
        "out": {"kernel": rng.normal(size=(3, 4, 8, 16)).astype(np.float32)},
        "wi": {"kernel": rng.normal(size=(3, 16, 64)).astype(np.float32)},
    }
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(grads))
    matrices = {"query": (16, 32), "out": (32, 16), "wi": (16, 64)}
    for name, (inputs, outputs) in matrices.items():
        for layer in range(3):
            found = np.asarray(updates[name]["kernel"][layer]).reshape(inputs, outputs)
            alone = orthogonalize(grads[name]["kernel"][layer].reshape(inputs, outputs))
            np.testing.assert_allclose(found, max(1, outputs / inputs) ** 0.5 * np.asarray(alone), rtol=1e-4, atol=1e-5)
            assert np.sqrt(np.mean(found**2)) == pytest.approx(inputs**-0.5, rel=0.15)
