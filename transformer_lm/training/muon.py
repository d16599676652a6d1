"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): momentum, made orthogonal.

The update of a matrix is U V^T where its momentum is U S V^T: each direction is gone as far, however weak its gradient.
It is found without a decomposition, by polynomials that move all singular values towards 1.
"""

import math

import jax
import jax.numpy as jnp
import optax

from transformer_lm import axes
from transformer_lm.models import PARAMETER_AXES

MOMENTUM = 0.95
# Coefficients (a, b, c) of X -> a X + (b A + c A^2) X, A = X X^T, one step after the other: those that bring singular
# values from 1e-3 to 1 nearest to 1 in five steps (Amsel et al. 2025, "The Polar Express", with their safety factor).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
SAFETY = 1.02
EPSILON = 1e-7


def scale_by_muon() -> optax.GradientTransformation:
    """Gradients -> orthogonal updates, for the kernels of blocks: stacked matrices [L, ...].

    The entries of an update [in, out] have a root mean square of 1 / sqrt(in): a learning rate fits any width.
    """
    momentum = optax.trace(decay=MOMENTUM, nesterov=True)

    def update(grads, state, params=None):
        grads, state = momentum.update(grads, state, params)
        return jax.tree_util.tree_map_with_path(_updates_of, grads), state

    return optax.GradientTransformation(momentum.init, update)


def _updates_of(path: tuple, grads: jax.Array) -> jax.Array:
    """Of one kernel of all layers [L, ...]; one layer after the other, so that no device holds more than one whole."""
    module, name = (entry.key for entry in path[-2:])
    inputs = 2 if module == "out" else 1  # axes that are summed over: in attention's output heads and their size
    names = PARAMETER_AXES[module, name]

    def of_layer(grad):
        grad = axes.named(grad, *names)
        matrix = axes.named(grad.reshape(math.prod(grad.shape[:inputs]), -1), None, None)  # [in, out]
        scale = max(1.0, matrix.shape[1] / matrix.shape[0]) ** 0.5
        return axes.named((scale * orthogonalize(matrix)).reshape(grad.shape), *names)

    return jax.lax.map(of_layer, grads)


def orthogonalize(matrix: jax.Array) -> jax.Array:
    """[m, n] -> about U V^T of its singular value decomposition U S V^T."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix  # the shorter side first: the products are smaller
    x = axes.named(x, None, "longer_side")
    x = x / (jnp.linalg.norm(x) * SAFETY + EPSILON)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = axes.named(x, None, None)
    return x.T if matrix.shape[0] > matrix.shape[1] else x
