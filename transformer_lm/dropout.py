"""Dropout that does not depend on where, or in how many parts, a batch is computed: each row has a key of its own."""

import jax
import jax.numpy as jnp
import numpy as np

Keys = jax.Array | None  # one PRNG key a row, [B]; None for no dropout


def row_keys(key: jax.Array, rows: jax.Array) -> jax.Array:
    """A key [B] for each of the rows [B], which are numbered within a step's batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)


def split(keys: Keys, num: int):
    """`num` independent keys for each row: [num, B], or so many None."""
    return [None] * num if keys is None else jax.vmap(lambda key: jax.random.split(key, num), out_axes=1)(keys)


def fold_in(keys: Keys, number) -> Keys:
    """Keys [B] for the number-th of several alike things."""
    return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def dropout(x: jax.Array, rate: float, keys: Keys) -> jax.Array:
    """Zeroes each element of x [B, ...] with probability `rate` and scales the rest; without keys, x as it is."""
    if keys is None or rate == 0.0:
        return x
    drop = random_bits(keys, x.shape[1:]) < np.uint32(rate * 2**32)
    return jnp.where(drop, jnp.zeros((), x.dtype), x / (1.0 - rate))


def random_bits(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint32 bits [B, *shape] for dropout: each element's index in its row, mixed with the row's key.

    Where `jax.random.bits` costs a sixth of a training step on CPU, this fuses into the multiplication that uses it,
    and the result does not depend on how the array is sharded. The mixer is lowbias32 of Chris Wellons' hash
    prospector (https://github.com/skeeto/hash-prospector): plenty for dropout, not for anything secret.
    """
    seed = jax.random.key_data(keys).reshape(-1, *[1] * len(shape), 2)  # [B, 1..., 2]
    x = jax.lax.iota(jnp.uint32, int(np.prod(shape))).reshape(1, *shape)
    x = (x ^ seed[..., 0]) * np.uint32(0x9E3779B1) + seed[..., 1]
    x = (x ^ (x >> 16)) * np.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * np.uint32(0x735A2D97)
    return x ^ (x >> 15)
