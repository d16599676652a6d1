"""The loss to minimise, and the sums to report."""

import math

import jax
import jax.numpy as jnp


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


def perplexity(loss: float) -> float:
    """exp(loss in nats a token), infinite where it overflows."""
    return math.exp(loss) if loss < 700 else math.inf
