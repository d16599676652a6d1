"""Products of activations and weights: `jax.lax.dot_general`, in the ways that XLA computes soonest."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from transformer_lm import axes


def dot_general(inputs, kernel, dimension_numbers, **options):
    """As jax.lax.dot_general of inputs [..., *in] and a kernel [*in, *out] of one type: [..., *out].

    Gradients are products of the inputs' type, also where the result is wider (logits): JAX would widen the inputs
    instead, and a GPU multiply at half the speed.

    The gradient of the kernel is a product with the transposed inputs. XLA's fast products for CPUs do not take a
    factor that lies transposed (jax 0.10): the general ones, which do, take up to twice as long. So on CPU the inputs
    are transposed first, which costs little beside the product.
    """
    multiply = functools.partial(jax.lax.dot_general, dimension_numbers=dimension_numbers, **options)
    return _product(multiply, len(dimension_numbers[0][0]), inputs, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(multiply, num_in: int, inputs, kernel):
    """What `multiply` gives, for which the last `num_in` axes of inputs meet as many in front of the kernel."""
    return multiply(inputs, kernel)


def _forward(multiply, num_in, inputs, kernel):
    return multiply(inputs, kernel), (inputs, kernel)


def _backward(multiply, num_in, residuals, grad):
    inputs, kernel = residuals
    grad = grad.astype(inputs.dtype)
    rows = inputs.ndim - num_in  # number of their axes
    out = tuple(range(rows, grad.ndim)), tuple(range(num_in, kernel.ndim))
    inputs_grad = jax.lax.dot_general(grad, kernel, (out, ((), ())))
    if axes.device().platform == "cpu" and inputs.dtype == jnp.float32:
        inputs = jax.lax.optimization_barrier(jnp.moveaxis(inputs, range(rows), range(-rows, 0)))  # [*in, ...]
        rows_of_inputs = tuple(range(num_in, inputs.ndim))
    else:
        rows_of_inputs = tuple(range(rows))
    return inputs_grad, jax.lax.dot_general(inputs, grad, ((rows_of_inputs, tuple(range(rows))), ((), ())))


_product.defvjp(_forward, _backward)


def add_bias(x, bias):
    """x [..., F] + bias [F], whose gradient XLA for CPUs (jax 0.10) adds up at a thirtieth of a product's speed."""
    if axes.device().platform == "cpu" and x.dtype == bias.dtype == jnp.float32:
        return _add_bias(x, bias)
    return x + bias


@jax.custom_vjp
def _add_bias(x, bias):
    return x + bias


def _sum_rows(_, grad):
    rows = grad.reshape(-1, grad.shape[-1])
    return grad, jnp.ones(len(rows), grad.dtype) @ rows


_add_bias.defvjp(lambda x, bias: (x + bias, None), _sum_rows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transposed:
    """A kernel [*in, *out] that lies in memory as [*out, *in]; models.bind gives the network the kernel."""

    array: jax.Array
    num_in: int = dataclasses.field(metadata={"static": True})  # number of its axes

    @classmethod
    def of(cls, kernel, num_in: int) -> "Transposed":
        """A kernel, so many of whose first axes are what it is multiplied by."""
        return cls(jnp.moveaxis(kernel, range(num_in), range(-num_in, 0)), num_in)

    @property
    def kernel(self) -> jax.Array:
        """The kernel, in a compiled function without moving anything."""
        return jnp.moveaxis(self.array, range(-self.num_in, 0), range(self.num_in))


def dot_general_of_transposed(inputs, kernel, dimension_numbers, **options):
    """As `dot_general`, for a kernel that lies in memory as [*out, *in].

    XLA for CPUs (jax 0.10) would copy the kernel where it has more than two axes, and where it is to be multiplied by
    one row, unless it is the first factor there. The copy takes ten times as long as a row's product.
    """
    num_in = len(dimension_numbers[0][0])
    return _product(functools.partial(_multiply_transposed, num_in, **options), num_in, inputs, kernel)


def _multiply_transposed(num_in: int, inputs, kernel, **options):
    rows, out = inputs.shape[: inputs.ndim - num_in], kernel.shape[num_in:]
    inputs = inputs.reshape(-1, math.prod(kernel.shape[:num_in]))
    matrix = Transposed.of(kernel, num_in).array.reshape(-1, inputs.shape[1])
    last = (((1,), (1,)), ((), ()))
    factors = (inputs, matrix) if len(inputs) > 1 else (matrix, inputs)
    return jax.lax.dot_general(*factors, last, **options).reshape(*rows, *out)
