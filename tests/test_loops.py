"""Layers one after the other: in a loop, and written out as on GPUs."""

import dataclasses

import jax
import numpy as np
import pytest

from transformer_lm import models


@pytest.mark.parametrize("remat", ["none", "block"])
def test_on_gpus_layers_are_written_out_unless_they_are_computed_again(monkeypatch, tiny, remat):
    """The gradient is that of the loop."""
    network = dataclasses.replace(tiny, remat=remat)
    params = jax.jit(models.init, static_argnums=0)(network, jax.random.key(0))
    arrays = np.ones((2, 8), np.int32), np.broadcast_to(np.arange(8, dtype=np.int32), (2, 8)), np.ones((2, 8), np.int32)

    def gradient():
        compiled = jax.jit(jax.grad(lambda params: models.bind(network, params)(*arrays).var()))
        return compiled(params), "while" in compiled.lower(params).as_text()

    expected, loops = gradient()
    assert loops
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found, loops = gradient()
    assert loops == (remat == "block")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)
