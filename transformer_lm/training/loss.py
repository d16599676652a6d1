"""The loss to minimise, and the sums to report."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from transformer_lm.logits import cut, join, score


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
    log_probs, likeliest = score(logits, targets)  # [B, T]
    loss = -log_probs
    if label_smoothing:
        vocab_size = logits.shape[-1]
        low = label_smoothing / (vocab_size - 1)
        high = 1.0 - label_smoothing
        all_tokens = vocab_size * jax.nn.logsumexp(logits, axis=-1) - logits.sum(axis=-1)
        loss = low * all_tokens - (high - low) * log_probs
        loss += high * math.log(high) + (vocab_size - 1) * low * math.log(low)
    totals = {
        "loss": -jnp.sum(log_probs * weights),
        "correct": jnp.sum(likeliest * weights),
        "tokens": jnp.sum(weights),
    }
    return jnp.sum(loss * weights), totals


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

    def summed(sums):
        return jax.tree.map(lambda of_chunks: of_chunks.sum(axis=0), sums)

    @jax.custom_vjp
    def loss(head, *arrays):
        return summed(jax.lax.map(lambda chunk: of_chunk(head, *chunk), cut(arrays, chunks)))

    def forward(head, *arrays):
        grad_of_chunk = jax.value_and_grad(of_chunk, argnums=(0, 1), has_aux=True)

        def add_chunk(head_grads, chunk):
            sums, (more, x_grads) = grad_of_chunk(head, *chunk)
            return jax.tree.map(jnp.add, head_grads, more), (sums, x_grads)

        start = jax.tree.map(jnp.zeros_like, head)
        head_grads, (sums, x_grads) = jax.lax.scan(add_chunk, start, cut(arrays, chunks))
        return summed(sums), (head_grads, join(x_grads))

    def backward(grads, cotangents):
        scale = cotangents[0]  # the sums to report have no gradient
        return *jax.tree.map(lambda grad: (grad * scale).astype(grad.dtype), grads), None, None

    loss.defvjp(forward, backward)
    return loss(head, x, targets, weights)


def perplexity(loss: float) -> float:
    """exp(loss in nats a token), infinite where it overflows."""
    return math.exp(loss) if loss < 700 else math.inf
