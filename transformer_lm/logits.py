"""Logits, made and asked in chunks of positions: all together they would be the largest array of a run.

Letters in shapes: B batch, T length, C chunks, V vocabulary.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

AT_ONCE = 2**26  # logits that a device makes at a time: 256 MB in float32


def score(logits, targets):
    """How likely targets are: logits [..., V], ids [...] -> log probabilities, and whether none is likelier, [...]."""
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    best_logits = jax.lax.stop_gradient(logits).max(axis=-1)  # argmax is slow on CPU
    return target_logits - jax.nn.logsumexp(logits, axis=-1), target_logits >= best_logits


def chunks_of(rows: int, length: int, vocab_size: int) -> int:
    """In how many chunks a device makes the logits of so many rows: the fewest of at most AT_ONCE that are alike."""
    wanted = -(-rows * length * vocab_size // AT_ONCE)
    return next(chunks for chunks in range(min(wanted, length), length + 1) if length % chunks == 0)


def cut(arrays: Sequence[jax.Array], chunks: int) -> tuple[jax.Array, ...]:
    """Arrays [B, T, ...] -> [C, B, T / C, ...]."""
    return tuple(array.reshape(array.shape[0], chunks, -1, *array.shape[2:]).swapaxes(0, 1) for array in arrays)


def join(array: jax.Array) -> jax.Array:
    """[C, B, T / C, ...] -> [B, T, ...]."""
    array = array.swapaxes(0, 1)
    return array.reshape(array.shape[0], -1, *array.shape[3:])
