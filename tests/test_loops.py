"""Layers one after the other: in a loop, and written out as on GPUs."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_lm import axes, loops, models


@pytest.mark.parametrize("remat", ["none", "block"])
def test_on_gpus_layers_are_written_out_for_a_gradient(monkeypatch, tiny, remat):
    """It is that of the loop; what is computed again stays in a loop."""
    network = dataclasses.replace(tiny, remat=remat)
    params = jax.jit(models.init, static_argnums=0)(network, jax.random.key(0))
    arrays = np.ones((2, 8), np.int32), np.broadcast_to(np.arange(8, dtype=np.int32), (2, 8)), np.ones((2, 8), np.int32)

    def gradient(platform):
        monkeypatch.setattr(axes, "device", lambda: types.SimpleNamespace(platform=platform))
        compiled = jax.jit(jax.grad(lambda params: models.bind(network, params).read(*arrays, for_gradient=True).var()))
        return compiled(params), "while" in compiled.lower(params).as_text()

    expected, is_loop = gradient("cpu")
    assert is_loop
    found, is_loop = gradient("gpu")
    assert is_loop == (remat == "block")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


@pytest.mark.parametrize(("number", "parts", "for_gradient", "written_out"), [
    (12, 1, True, 12), (40, 1, True, 20), (12, 1, False, 1), (12, 8, True, 1),
])  # fmt: skip
def test_how_many_are_written_out(monkeypatch, number, parts, for_gradient, written_out):
    """Not all of many, and none of which a device has only a part."""
    monkeypatch.setattr(axes, "device", lambda: types.SimpleNamespace(platform="gpu"))
    monkeypatch.setattr(axes, "ways", lambda name: parts)

    def run(x, layers):
        return loops.over_layers(
            lambda x, layer: (jnp.sin(x) + layer, None), x, layers, for_gradient=for_gradient, remat="none"
        )[0]

    arrays = jnp.float32(1), jnp.ones(number)
    expected = functools.reduce(lambda x, layer: np.sin(x) + layer, np.ones(number), 1.0)
    assert float(run(*arrays)) == pytest.approx(expected, rel=1e-5)
    assert jax.jit(run).lower(*arrays).compile().as_text().count(" sine(") == written_out


@pytest.mark.parametrize(("remat", "keep", "products", "sines"), [
    ("none", lambda x: x, 3, 3), ("none", loops.keep, 3, 2), ("block", loops.keep, 4, 3),
])  # fmt: skip
def test_what_is_kept_for_the_gradient(remat, keep, products, sines):
    """A product, which has two more for its gradient, and what is named; how often each is computed says so."""

    def run_layer(x, weights):
        return jnp.sin(keep(jnp.sin(x @ weights))), None

    def loss(x, weights):
        return loops.over_layers(run_layer, x, weights, for_gradient=True, remat=remat)[0].sum()

    text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(jnp.ones((4, 8)), jnp.ones((3, 8, 8))))
    assert [text.count(f"= {name}") for name in ("dot_general[", "sin ")] == [products, sines]
