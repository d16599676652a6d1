"""Dropout that does not depend on where, or in how many parts, a batch is computed: each row has a key of its own."""

import jax
import jax.numpy as jnp
import numpy as np

KEYS = "threefry2x32"  # the kind of keys that dropout takes the two numbers out of, whatever JAX's default is

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
    seeds = jax.random.key_data(keys).reshape(-1, *[1] * (x.ndim - 1), 2)  # [B, 1..., 2]
    places = jax.lax.iota(jnp.uint32, int(np.prod(x.shape[1:]))).reshape(1, *x.shape[1:])
    return jnp.where(falls_out(places, seeds[..., 0], seeds[..., 1], rate), jnp.zeros((), x.dtype), x / (1.0 - rate))


def falls_out(places: jax.Array, first, second, rate: float) -> jax.Array:
    """Whether elements drop out, by their places in a row (uint32) and the two numbers of the row's key.

    Where `jax.random.bits` costs a sixth of a training step on CPU, this fuses into the multiplication that uses it,
    and the result does not depend on how the array is sharded. The mixer is lowbias32 of Chris Wellons' hash
    prospector (https://github.com/skeeto/hash-prospector): plenty for dropout, not for anything secret.
    """
    x = (places ^ first) * np.uint32(0x9E3779B1) + second
    x = (x ^ (x >> 16)) * np.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * np.uint32(0x735A2D97)
    return (x ^ (x >> 15)) < np.uint32(rate * 2**32)
