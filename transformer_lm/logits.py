"""Logits, made and asked in chunks of positions: all together they would be the largest array of a run.

Letters in shapes: B batch, T length, C chunks, V vocabulary.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from transformer_lm import axes

AT_ONCE = 2**26  # logits that a device makes at a time: 256 MB in float32
MOST, BYTES = 2**30, 64  # on a GPU with room for more: how many at most, and bytes of its memory for each of them
ALIKE = 1e-5  # nats above the log probability that each of all would have


def score(logits, targets):
    """How likely targets are: logits [..., V], ids [...] -> log probabilities, and whether none is likelier, [...].

    Where all are alike, as in the first step of a network whose logits begin at zero, no target is the likeliest.
    """
    target_logits = pick(logits, targets)
    best_logits = jax.lax.stop_gradient(logits).max(axis=-1)  # argmax is slow on CPU
    log_probs = target_logits - jax.nn.logsumexp(logits, axis=-1)
    return log_probs, (target_logits >= best_logits) & (log_probs > ALIKE - jnp.log(logits.shape[-1]))


@jax.custom_vjp
def pick(logits, targets):
    """Logits of targets: [..., V], ids [...] -> [...]. The gradient is compared, not scattered into zeros."""
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def _pick_back(residuals, grad):
    targets, logits = residuals
    ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    return jnp.where(ids == targets[..., None], grad[..., None], 0).astype(logits.dtype), None


pick.defvjp(lambda logits, targets: (pick(logits, targets), (targets, logits)), _pick_back)


def at_once() -> int:
    """How many logits a device makes at a time: on a GPU with room for more, many, which costs fewer turns.

    Of several processes each sees its own memory, and all have to make as many turns; of devices that are compiled
    for, and are not at hand, nobody sees it.
    """
    device = axes.device()
    if device.platform != "gpu" or jax.process_count() > 1 or device not in jax.local_devices():
        return AT_ONCE
    memory = (device.memory_stats() or {}).get("bytes_limit", 0)
    return max(AT_ONCE, min(MOST, memory // BYTES))


def chunks_of(rows: int, length: int, vocab_size: int) -> int:
    """In how many chunks a device makes the logits of so many rows: the fewest of at most `at_once` that are alike."""
    wanted = -(-rows * length * vocab_size // at_once())
    return next(chunks for chunks in range(min(wanted, length), length + 1) if length % chunks == 0)


def cut(arrays: Sequence[jax.Array], chunks: int) -> tuple[jax.Array, ...]:
    """Arrays [B, T, ...] -> [C, B, T / C, ...]."""
    return tuple(array.reshape(array.shape[0], chunks, -1, *array.shape[2:]).swapaxes(0, 1) for array in arrays)


def join(array: jax.Array) -> jax.Array:
    """[C, B, T / C, ...] -> [B, T, ...]."""
    array = array.swapaxes(0, 1)
    return array.reshape(array.shape[0], -1, *array.shape[3:])
