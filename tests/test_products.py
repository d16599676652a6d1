"""Products in the forms that XLA multiplies fast: the same numbers and gradients as NumPy's or the plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_lm.products import add_bias, dot_general, dot_general_of_transposed

# inputs, kernel, and how NumPy says what their product is
CASES = {
    "matrix": ((2, 3, 4), (4, 5), "btd,df->btf"),
    "into heads": ((2, 3, 4), (4, 5, 6), "btd,dhk->bthk"),
    "out of heads": ((2, 3, 5, 6), (5, 6, 4), "bthk,hkd->btd"),
    "one row": ((4,), (4, 5), "d,df->f"),
    "one row into heads": ((1, 1, 4), (4, 5, 6), "btd,dhk->bthk"),
    "one row out of heads": ((1, 1, 5, 6), (5, 6, 4), "bthk,hkd->btd"),
}


@pytest.mark.parametrize("case", CASES)
def test_product_and_gradients_are_those_of_numpy(case):
    shape, kernel_shape, letters = CASES[case]
    rng = np.random.default_rng(0)
    inputs, kernel = (rng.standard_normal(size).astype(np.float32) for size in (shape, kernel_shape))
    left, right, out = letters.replace("->", ",").split(",")
    shared = len(set(left) & set(right))
    numbers = ((tuple(range(len(left) - shared, len(left))), tuple(range(shared))), ((), ()))
    product, gradients = jax.jit(lambda *arrays: jax.vjp(lambda *pair: dot_general(*pair, numbers), *arrays))(
        inputs, kernel
    )
    expected = np.einsum(letters, inputs, kernel)
    np.testing.assert_allclose(product, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dot_general_of_transposed(inputs, kernel, numbers), expected, rtol=1e-5, atol=1e-5)
    grad = rng.standard_normal(product.shape).astype(np.float32)
    inputs_grad, kernel_grad = gradients(grad)
    np.testing.assert_allclose(inputs_grad, np.einsum(f"{out},{right}->{left}", grad, kernel), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(kernel_grad, np.einsum(f"{left},{out}->{right}", inputs, grad), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_bias_and_its_gradient(dtype):
    rng = np.random.default_rng(0)
    x, bias, grad = (rng.integers(-9, 9, shape).astype(dtype) for shape in ((2, 3, 5), (5,), (2, 3, 5)))
    total, gradients = jax.jit(lambda *arrays: jax.vjp(add_bias, *arrays))(x, bias)
    np.testing.assert_array_equal(total, x + bias)
    for found, expected in zip(gradients(jnp.asarray(grad)), (grad, grad.sum((0, 1))), strict=True):
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, expected)


def test_gradients_of_a_wider_result_are_products_of_the_inputs_type():
    """Logits are float32; nothing wider than bfloat16 is multiplied for their gradients."""
    rng = np.random.default_rng(0)
    inputs, kernel = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((2, 3, 4), (4, 5)))
    grad = jnp.asarray(rng.standard_normal((2, 3, 5)), jnp.float32)

    def gradients(inputs, kernel, grad):
        def multiply(*pair):
            return dot_general(*pair, (((2,), (0,)), ((), ())), preferred_element_type=jnp.float32)

        product, pull_back = jax.vjp(multiply, inputs, kernel)
        assert product.dtype == jnp.float32
        return pull_back(grad)

    narrow = grad.astype(jnp.bfloat16)
    expected = jnp.einsum("btf,df->btd", narrow, kernel), jnp.einsum("btd,btf->df", inputs, narrow)
    for found, right in zip(gradients(inputs, kernel, grad), expected, strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(np.float32), right.astype(np.float32), rtol=2e-2, atol=2e-2)
    text = jax.jit(gradients).lower(inputs, kernel, grad).as_text()
    factors = [line.partition(" : ")[2].partition("->")[0] for line in text.splitlines() if "dot_general" in line]
    assert len(factors) == 2
    assert not any("f32" in line.replace("bf16", "") for line in factors)
