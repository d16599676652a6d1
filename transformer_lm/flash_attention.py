"""Attention in packed rows as kernels for GPUs, with dropout: in JAX's Pallas, compiled by Triton.

After FlashAttention-2 (Dao 2023): scores are made a block of queries and a block of keys at a time, and none is kept;
going backwards they are made again. Two things are the task's own. Texts lie in a row one after the other, so that a
token sees the tokens from its text's first one to itself, and blocks of which nothing is seen are not computed. And
dropout takes the bits of `transformer_lm.dropout`, which depend on a row's key and an element's place alone: the same
as in attention written out, for rows that are not longer than `attention.LONG`.

JAX (0.11) means to give up this part of Pallas some day; `attention.choose` then does without these kernels.

Letters in shapes: B batch, T length, H heads, G heads of keys and values, K head size, Q queries and S keys of a block.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas
from jax.experimental.pallas import triton

from transformer_lm import axes
from transformer_lm.dropout import falls_out
from transformer_lm.errors import UserError
from transformer_lm.loops import keep

INTERPRET = False  # whether kernels are run by JAX, on any device; for tests
BLOCK, LARGE, BLOCK_OF_LARGE = 64, 128, 32  # tokens of a block; of large heads, that shared memory holds it
SMALLEST = 16  # side of a matrix that Triton multiplies
LOG2_E = math.log2(math.e)
UNSEEN = -1e30  # a score that weighs nothing, and is no infinity


class Places(NamedTuple):
    """What a token may see, and what the bits of dropout depend on.

    Attributes:
      starts: [B, T] int32, the first token of each one's text.
      ends: [B, T] int32, the first token after it.
      seeds: [B, 2] uint32, keys of dropout.
      heads: [H] int32, numbers of the heads, of which a device may have some.
    """

    starts: jax.Array
    ends: jax.Array
    seeds: jax.Array
    heads: jax.Array


def bounds(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the text of each token begins and ends, of segments [B, T]: Places.starts and ends."""
    length = segments.shape[1]
    places, edge = jnp.arange(length, dtype=jnp.int32), jnp.ones_like(segments[:, :1], bool)
    changes = segments[:, 1:] != segments[:, :-1]  # [B, T - 1]
    starts = jnp.where(jnp.concatenate([edge, changes], axis=1), places, 0)
    ends = jnp.where(jnp.concatenate([changes, edge], axis=1), places + 1, length)
    return jax.lax.cummax(starts, axis=1), jax.lax.cummin(ends, axis=1, reverse=True)


def block_of(length: int, size: int) -> int:
    """Tokens of a block, in rows of a length, of heads of a size.

    Raises:
      UserError: the kernels are not made for such, or not for this device.
    """
    block = math.gcd(length, BLOCK if size < LARGE else BLOCK_OF_LARGE)
    if INTERPRET:
        return block
    platform = axes.device().platform
    if platform != "gpu":
        raise UserError(f"attention='triton' runs on GPUs, not on {platform.upper()}; set attention='auto'.")
    if block < SMALLEST or size not in (16, 32, 64, LARGE):
        raise UserError(
            f"attention='triton' takes heads of 16, 32, 64 or 128 and rows of a multiple of 16, not heads of {size} "
            f"and rows of {length}; set attention='auto'."
        )
    return block


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention(query, key, value, places: Places, rate: float):
    """query [B, T, H, K], divided by sqrt(K), key and value [B, T, G, K] -> [B, T, H, K]; `rate` is dropout's."""
    return _forward(query, key, value, places, rate)[0]


def _forward(query, key, value, places, rate):
    batch, length, heads, size = query.shape
    block = block_of(length, size)
    part = _part(size, block)
    out, log_sums = _call(
        functools.partial(_attend, block=block, rate=rate), (length // block, batch, heads), places,
        [(query, part), (key, _whole(key, heads)), (value, _whole(value, heads))],
        [(query, part), (jax.ShapeDtypeStruct((batch, heads, length), jnp.float32), _row_part(block))],
    )  # fmt: skip
    out, log_sums = keep(out), keep(log_sums)
    return out, (query, key, value, places, out, log_sums)


def _backward(rate, residuals, grad):
    query, key, value, places, out, log_sums = residuals
    batch, length, heads, size = query.shape
    block = block_of(length, size)
    grid, group = (length // block, batch, heads), heads // key.shape[2]
    means = jnp.einsum("bthk,bthk->bht", out, grad, preferred_element_type=jnp.float32)  # of the weights' gradients
    arrays = query, key, value, grad, log_sums, means
    part, whole, numbers = _part(size, block), _whole(query, heads), pallas.BlockSpec((None, None, length), _of_head)
    keys = _part(size, block, group)
    by_head = jax.ShapeDtypeStruct(query.shape, key.dtype), part  # of keys and values, for each head of queries
    key_grad, value_grad = _call(
        functools.partial(_differentiate_keys, block=block, rate=rate), grid, places,
        zip(arrays, (whole, keys, keys, whole, numbers, numbers), strict=True), [by_head, by_head],
    )  # fmt: skip
    keys, numbers = _whole(key, heads), _row_part(block)
    [query_grad] = _call(
        functools.partial(_differentiate_queries, block=block, rate=rate), grid, places,
        zip(arrays, (part, keys, keys, part, numbers, numbers), strict=True), [(query, part)],
    )  # fmt: skip
    if group > 1:
        key_grad, value_grad = (x.reshape(*key.shape[:3], group, size).sum(axis=3) for x in (key_grad, value_grad))
    return query_grad, key_grad, value_grad, None


attention.defvjp(_forward, _backward)


def _call(kernel, grid: tuple[int, int, int], places: Places, inputs: Iterable, outputs: Sequence):
    """Runs a kernel for each block of a row, each row, and each head.

    Args:
      kernel: (places, *inputs, *outputs), all as references.
      grid: number of blocks, rows and heads.
      places: of all rows.
      inputs: arrays, and which part of them the kernel sees.
      outputs: what is like the results, and the part that it writes.
    """
    row = pallas.BlockSpec((None, places.starts.shape[1]), lambda i, b, h: (b, 0))
    seeds, head = pallas.BlockSpec((None, 2), lambda i, b, h: (b, 0)), pallas.BlockSpec((None,), lambda i, b, h: (h,))
    arrays, specs = zip(*inputs, strict=True)
    return pallas.pallas_call(
        kernel,
        grid=grid,
        in_specs=[Places(row, row, seeds, head), *specs],
        out_specs=[spec for _, spec in outputs],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outputs],
        compiler_params=triton.CompilerParams(num_warps=4 if arrays[0].shape[-1] <= 64 else 8, num_stages=2),
        interpret=INTERPRET,
    )(places, *arrays)


def _of_head(_, row, head):
    return row, head, 0


def _row_part(block: int) -> pallas.BlockSpec:
    """A block of numbers of one head, of [B, H, T]."""
    return pallas.BlockSpec((None, None, block), lambda i, b, h: (b, h, i))


def _part(size: int, block: int, group: int = 1) -> pallas.BlockSpec:
    """A block of tokens, of the head of [B, T, G, K] that one of `group` times as many heads reads."""
    return pallas.BlockSpec((None, block, None, size), lambda i, b, h: (b, i, jax.lax.div(h, group), 0))


def _whole(x, heads: int) -> pallas.BlockSpec:
    """All tokens of the head of x [B, T, G, K] that one of so many heads reads."""
    group = heads // x.shape[2]
    return pallas.BlockSpec((None, x.shape[1], None, x.shape[-1]), lambda i, b, h: (b, 0, jax.lax.div(h, group), 0))


def _attend(places: Places, query_ref, key_ref, value_ref, out_ref, log_sums_ref, *, block: int, rate: float):
    """What a block of queries [Q, K] attends to, and the logarithms to base 2 of the sums of their weights."""
    number = pallas.program_id(0)
    query, queries = query_ref[...], number * block + jnp.arange(block)
    starts = places.starts[pallas.ds(number * block, block)]

    def add_block(other, state):
        out, most, total = state
        at, keys = pallas.ds(other * block, block), other * block + jnp.arange(block)
        scores = _scores(query, key_ref[at, :], starts, queries, keys)
        higher = jnp.maximum(most, scores.max(axis=1))
        before, weights = jnp.exp2(most - higher), jnp.exp2(scores - higher[:, None])
        total = total * before + weights.sum(axis=1)
        if rate:
            weights = jnp.where(_dropped(places, queries, keys, rate), 0.0, weights)
        return out * before[:, None] + _product(weights, value_ref[at, :]), higher, total

    nothing = jnp.zeros(query.shape, jnp.float32), jnp.full(block, UNSEEN, jnp.float32), jnp.zeros(block, jnp.float32)
    out, most, total = jax.lax.fori_loop(_first(places, number, block), number + 1, add_block, nothing)
    out_ref[...] = (out / (total * (1.0 - rate))[:, None]).astype(out_ref.dtype)
    log_sums_ref[...] = most + jnp.log2(total)


def _differentiate_keys(
    places: Places, query_ref, key_ref, value_ref, grad_ref, log_sums_ref, means_ref, key_grad_ref, value_grad_ref,
    *, block: int, rate: float,
):  # fmt: skip
    """Gradients of a block of keys and values [S, K]."""
    number = pallas.program_id(0)
    key, value, keys = key_ref[...], value_ref[...], number * block + jnp.arange(block)

    def add_block(other, state):
        key_grad, value_grad = state
        at, queries = pallas.ds(other * block, block), other * block + jnp.arange(block)
        query, grad = query_ref[at, :], grad_ref[at, :]
        weights = jnp.exp2(_scores(query, key, places.starts[at], queries, keys) - log_sums_ref[at][:, None])
        weights_grad, used = _product(grad, value.T), weights
        if rate:
            dropped = _dropped(places, queries, keys, rate)
            weights_grad, used = (jnp.where(dropped, 0.0, x / (1.0 - rate)) for x in (weights_grad, weights))
        scores_grad = weights * (weights_grad - means_ref[at][:, None])  # [Q, S]
        return key_grad + _product(scores_grad.T, query), value_grad + _product(used.T, grad)

    last = places.ends[(number + 1) * block - 1]
    nothing = jnp.zeros(key.shape, jnp.float32)
    key_grad, value_grad = jax.lax.fori_loop(
        number, jax.lax.div(last + block - 1, block), add_block, (nothing, nothing)
    )
    key_grad_ref[...], value_grad_ref[...] = (x.astype(key_grad_ref.dtype) for x in (key_grad, value_grad))


def _differentiate_queries(
    places: Places, query_ref, key_ref, value_ref, grad_ref, log_sums_ref, means_ref, query_grad_ref,
    *, block: int, rate: float,
):  # fmt: skip
    """Gradients of a block of queries [Q, K]."""
    number = pallas.program_id(0)
    query, grad, queries = query_ref[...], grad_ref[...], number * block + jnp.arange(block)
    starts, log_sums, means = places.starts[pallas.ds(number * block, block)], log_sums_ref[...], means_ref[...]

    def add_block(other, query_grad):
        at, keys = pallas.ds(other * block, block), other * block + jnp.arange(block)
        key = key_ref[at, :]
        weights = jnp.exp2(_scores(query, key, starts, queries, keys) - log_sums[:, None])
        weights_grad = _product(grad, value_ref[at, :].T)
        if rate:
            dropped = _dropped(places, queries, keys, rate)
            weights_grad = jnp.where(dropped, 0.0, weights_grad / (1.0 - rate))
        return query_grad + _product(weights * (weights_grad - means[:, None]), key)

    nothing = jnp.zeros(query.shape, jnp.float32)
    query_grad = jax.lax.fori_loop(_first(places, number, block), number + 1, add_block, nothing)
    query_grad_ref[...] = query_grad.astype(query_grad_ref.dtype)


def _first(places: Places, number, block: int):
    """The first block of keys of which the number-th block of queries sees anything."""
    return jax.lax.div(places.starts[number * block], block)


def _scores(query, key, starts, queries, keys):
    """[Q, K] and [S, K], and where they stand in the row -> scores times log2(e) [Q, S]."""
    seen = (starts[:, None] <= keys[None, :]) & (keys[None, :] <= queries[:, None])
    return jnp.where(seen, _product(query, key.T) * LOG2_E, UNSEEN)


def _product(left, right):
    """The product of matrices in the second one's type, summed up in float32."""
    return jnp.dot(left.astype(right.dtype), right, preferred_element_type=jnp.float32)


def _dropped(places: Places, queries, keys, rate: float):
    """Which weights fall out [Q, S]: those of `dropout` of all weights [B, H, T, T]."""
    length = places.starts.shape[0]
    rows = places.heads[...] * length + queries  # [Q]
    return falls_out(
        rows.astype(jnp.uint32)[:, None] * np.uint32(length) + keys.astype(jnp.uint32)[None, :],
        places.seeds[0],
        places.seeds[1],
        rate,
    )
