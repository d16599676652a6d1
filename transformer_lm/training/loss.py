"""The loss to minimise, and the sums to report."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

LOGITS_AT_ONCE = 2**26  # of a device: 256 MB in float32


def loss_and_totals(logits, targets, weights, label_smoothing: float = 0.0):
    """Summed loss to minimise, and the sums to report.

    Args:
      logits: [B, T, V] float32.
      targets: [B, T] int32.
      weights: [B, T] float32, 0 where there is no token.
      label_smoothing: e; the target distribution is 1 - e on the target and e / (V - 1) on every other token.

    Returns:
      the smoothed loss less the entropy of the target distribution (so that its least value is 0), in nats summed
      over tokens; and {"loss": plain cross entropy, "correct": targets of the highest logit, "tokens": sum of weights}.
    """
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)  # [B, T]
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    cross_entropy = log_normalizer - target_logits
    loss = cross_entropy
    if label_smoothing:
        vocab_size = logits.shape[-1]
        low = label_smoothing / (vocab_size - 1)
        high = 1.0 - label_smoothing
        all_tokens = vocab_size * log_normalizer - logits.sum(axis=-1)
        loss = (high - low) * cross_entropy + low * all_tokens
        loss += high * math.log(high) + (vocab_size - 1) * low * math.log(low)
    best_logits = jax.lax.stop_gradient(logits).max(axis=-1)  # argmax is slow on CPU
    totals = {
        "loss": jnp.sum(cross_entropy * weights),
        "correct": jnp.sum((target_logits >= best_logits) * weights),
        "tokens": jnp.sum(weights),
    }
    return jnp.sum(loss * weights), totals


def chunks_of(rows: int, length: int, vocab_size: int) -> int:
    """In how many parts the logits of rows are made, so that no device holds more than LOGITS_AT_ONCE; divides T."""
    wanted = -(-rows * length * vocab_size // LOGITS_AT_ONCE)
    return next(chunks for chunks in range(min(wanted, length), length + 1) if length % chunks == 0)


def chunked_loss_and_totals(
    to_logits: Callable[[Any, jax.Array], jax.Array], head, x, targets, weights, *, label_smoothing: float, chunks: int
):
    """`loss_and_totals` of to_logits(head, x), with the logits of a part of the positions at a time.

    The gradient of a part is taken right after its loss, as long as its logits are there: they are neither kept nor
    computed twice.

    Args:
      to_logits: (head, [B, t, D]) -> [B, t, V].
      head: parameters.
      x: [B, T, D].
      targets, weights: [B, T].
      label_smoothing: as in `loss_and_totals`.
      chunks: number of parts; divides T.
    """

    def of_chunk(head, x, targets, weights):
        return loss_and_totals(to_logits(head, x), targets, weights, label_smoothing)

    def zeros_of(function, *arguments):
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, *arguments))

    @jax.custom_vjp
    def loss(head, *arrays):
        parts = _cut(arrays, chunks)

        def add_chunk(sums, part):
            return jax.tree.map(jnp.add, sums, of_chunk(head, *part)), None

        return jax.lax.scan(add_chunk, zeros_of(of_chunk, head, *(part[0] for part in parts)), parts)[0]

    def forward(head, *arrays):
        parts = _cut(arrays, chunks)
        grad_of_chunk = jax.value_and_grad(of_chunk, argnums=(0, 1), has_aux=True)

        def add_chunk(carry, part):
            sums, (head_grads, x_grads) = grad_of_chunk(head, *part)
            return jax.tree.map(jnp.add, carry, (sums, head_grads)), x_grads

        start = zeros_of(of_chunk, head, *(part[0] for part in parts)), jax.tree.map(jnp.zeros_like, head)
        (sums, head_grads), x_grads = jax.lax.scan(add_chunk, start, parts)
        return sums, (head_grads, x_grads.swapaxes(0, 1).reshape(arrays[0].shape))

    def backward(grads, cotangents):
        scale = cotangents[0]  # the sums to report have no gradient
        return *jax.tree.map(lambda grad: (grad * scale).astype(grad.dtype), grads), None, None

    loss.defvjp(forward, backward)
    return loss(head, x, targets, weights)


def _cut(arrays, chunks: int):
    """Arrays [B, T, ...] -> [chunks, B, T / chunks, ...]."""
    return tuple(array.reshape(array.shape[0], chunks, -1, *array.shape[2:]).swapaxes(0, 1) for array in arrays)


def perplexity(loss: float) -> float:
    """exp(loss in nats a token), infinite where it overflows."""
    return math.exp(loss) if loss < 700 else math.inf
