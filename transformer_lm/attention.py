"""Attention of queries to keys and values: written out for XLA, and the fused kernels of GPUs and TPUs.

Letters in shapes: B batch, T length, H heads, G heads of keys and values, each for H / G of the others that follow one
another, K head size, S slots of keys. Queries arrive divided by sqrt(K).
"""

import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from transformer_lm import axes, loops
from transformer_lm.dropout import Keys, dropout, fold_in
from transformer_lm.errors import UserError
from transformer_lm.fields import check_value

KINDS = ("xla", "cudnn", "triton", "tpu")  # for any device, NVIDIA GPUs, GPUs, TPUs
WITH_DROPOUT = ("xla", "triton")
RUNS_ON = {"cudnn": "gpu", "tpu": "tpu"}  # platforms; flash_attention.py, which JAX can interpret, checks its own
LONG = 1024  # attention of more queries is computed in blocks
QUERY_BLOCK = 256  # of so many
SLOT_BLOCK = 128  # slots of a cache that are attended to at a time, where rows begin at different times
TRITON_BLOCK = 64  # lengths for which the kernels of flash_attention.py are fast are multiples of it
TRITON_SIZES = (32, 64, 128)  # head sizes that they are made for; cuDNN is left the largest where it can
TPU_BLOCK, LARGEST_TPU_BLOCK = 128, 512  # lengths that the TPU's kernel takes are multiples of the first
TPU_LANES = 128  # head sizes that it takes are at most so large, or multiples of it
# Names of the axes of queries, of keys and values, and of what rows have.
HEADS, KEY_HEADS, ROWS = ("batch", "num_heads", None, None), ("batch", "kv_heads", None, None), ("batch", None)


def check_kind(kind: str):
    """Raises UserError for what is no kind of attention."""
    check_value("attention", kind, str)
    if kind not in ("auto", *KINDS):
        raise UserError(f"attention={kind!r} must be one of auto, {', '.join(KINDS)}.")


def check_rows(kind: str, size: int, lengths: Iterable[int]):
    """Raises UserError for devices, heads of a size, or rows of lengths, that a kind is not made for."""
    platform = axes.device().platform
    if platform != RUNS_ON.get(kind, platform):
        raise UserError(f"attention={kind!r} does not run on {platform.upper()}; set attention='auto'.")
    if kind == "tpu":
        for length in lengths:
            if length % TPU_BLOCK:
                raise UserError(
                    f"attention='tpu' takes rows of a multiple of {TPU_BLOCK}, not of {length}; set attention='auto'."
                )
    if kind == "triton":
        from transformer_lm import flash_attention

        for length in lengths:
            flash_attention.block_of(length, size)


def attend_in_rows(query, key, value, segments, *, kind: str = "auto", dropout_rate=0.0, dropout_keys: Keys = None):
    """Attention in packed rows: a token sees itself and what stands before it in its own segment.

    Args:
      query: [B, H, T, K].
      key, value: [B, G, T, K].
      segments: [B, T] int32; the tokens of a segment lie side by side.
      kind: "auto", or one of KINDS; of fused ones "triton" alone has dropout.
      dropout_rate: on attention weights.
      dropout_keys: one a row [B]; None switches dropout off.

    Returns:
      [B, H, T, K].
    """
    rate = dropout_rate if dropout_keys is not None else 0.0
    kind = choose(query, rate) if kind == "auto" else kind
    if rate and kind not in WITH_DROPOUT:
        raise UserError(f"attention={kind!r} has no dropout; set attention_dropout_rate=0.0, or attention='auto'.")
    if kind == "cudnn":
        return _cudnn(query, key, value, segments)
    if kind == "triton":
        return _triton(query, key, value, segments, rate, dropout_keys)
    if kind == "tpu":
        return axes.by_device(_tpu, (HEADS, KEY_HEADS, KEY_HEADS, ROWS), HEADS)(query, key, value, segments)
    if query.shape[2] > LONG:
        return _attend_in_blocks(query, key, value, segments, rate, dropout_keys)
    causal = jnp.tril(jnp.ones((query.shape[2],) * 2, bool))
    mask = causal & (segments[:, :, None] == segments[:, None, :])  # [B, T, T]
    return attend(query, key, value, mask, dropout_rate=rate, dropout_keys=dropout_keys)


def choose(query, dropout_rate: float) -> str:
    """The fastest kind that there is for queries [B, H, T, K] on the devices that are compiled for."""
    length, size = query.shape[-2:]
    device = axes.device()
    if device.platform == "gpu" and query.dtype == jnp.bfloat16 and _has_fused_attention(device):
        if size in TRITON_SIZES and length % TRITON_BLOCK == 0 and (dropout_rate or size <= 64) and _has_triton():
            return "triton"
        return "cudnn" if not dropout_rate and size % 8 == 0 and size <= 128 and length % 2 == 0 else "xla"
    # A TPU before v4 multiplies no bfloat16 to float32 in a kernel.
    if device.platform == "tpu" and device.device_kind not in ("TPU v2", "TPU v3") and not dropout_rate:
        return "tpu" if length % TPU_BLOCK == 0 and (size <= TPU_LANES or size % TPU_LANES == 0) else "xla"
    return "xla"


def _has_fused_attention(device: jax.Device) -> bool:
    """Whether a GPU is NVIDIA's, of Ampere or later: compute capability 8.0 (AMD's are like gfx90a)."""
    major, _, minor = getattr(device, "compute_capability", "").partition(".")
    return major.isdecimal() and minor.isdecimal() and int(major) >= 8


@functools.cache
def _has_triton() -> bool:
    """Whether this JAX has Pallas for Triton, which it means to give up (0.11)."""
    try:
        from transformer_lm import flash_attention  # noqa: F401
    except (ImportError, AttributeError):  # as what JAX has given up raises
        return False
    return True


def attend(query, key, value, mask, *, dropout_rate=0.0, dropout_keys: Keys = None):
    """query [B, H, T, K], key and value [B, G, S, K], mask [B, T, S] -> [B, H, T, K]; scores in float32."""
    batch, heads, length, size = query.shape
    by_key = (batch, key.shape[1], heads // key.shape[1] * length)  # queries that read the same keys, in one product
    scores = jnp.einsum("bgtk,bgsk->bgts", query.reshape(*by_key, size), key, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, heads, length, -1)
    scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)  # [B, H, T, S]
    weights = dropout(jax.nn.softmax(scores, axis=-1).astype(query.dtype), dropout_rate, dropout_keys)
    return jnp.einsum("bgts,bgsk->bgtk", weights.reshape(*by_key, -1), value).reshape(query.shape)


def attend_to_filled(query, key, value, mask, filled, **no_dropout):
    """As `attend`, of the first `filled` slots alone, a scalar that is known when it runs: the rest costs nothing.

    The softmax is computed block after block (Milakov and Gimelshein 2018). A row's rounding does not depend on
    `filled`: of a block in which it sees nothing it gets zeros, exactly.

    Args:
      query: [B, H, T, K].
      key, value: [B, G, S, K], S a multiple of SLOT_BLOCK unless it is smaller.
      mask: [B, T, S].
      no_dropout: what says that there is none, as to `attend`.
      filled: int32 scalar, at most S; no row sees a slot from there on, and each sees one in the first block.
    """
    batch, heads, length, size = query.shape
    block = min(SLOT_BLOCK, key.shape[2])
    grouped = query.reshape(batch, key.shape[1], -1, size)  # [B, G, H / G * T, K]

    def add_block(number, state):
        most, total, attended = state
        keys, values, seen = (
            jax.lax.dynamic_slice_in_dim(x, number * block, block, axis=2) for x in (key, value, mask)
        )
        scores = jnp.einsum("bgtk,bgsk->bgts", grouped, keys, preferred_element_type=jnp.float32)
        scores = jnp.where(seen[:, None], scores.reshape(batch, heads, length, -1), jnp.finfo(jnp.float32).min)
        higher = jnp.maximum(most, scores.max(axis=-1, keepdims=True))  # [B, H, T, 1]
        weights, before = jnp.exp(scores - higher), jnp.exp(most - higher)
        by_key = weights.astype(query.dtype).reshape(*grouped.shape[:3], block)
        values = jnp.einsum("bgts,bgsk->bgtk", by_key, values, preferred_element_type=jnp.float32)
        total = total * before + weights.sum(axis=-1, keepdims=True)
        return higher, total, attended * before + values.reshape(query.shape)

    nothing = jnp.full((batch, heads, length, 1), jnp.finfo(jnp.float32).min)
    state = nothing, jnp.zeros_like(nothing), jnp.zeros(query.shape, jnp.float32)
    _, total, attended = jax.lax.fori_loop(0, -(-filled // block), add_block, state)
    return (attended / total).astype(query.dtype)


def _attend_in_blocks(query, key, value, segments, dropout_rate, dropout_keys):
    """As `attend_in_rows`: the scores of QUERY_BLOCK queries are all that there are at a time, backwards, too."""
    slots = jnp.arange(key.shape[2])

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend_one(one):
        query, segment, place = one  # [B, H, K], [B], scalar
        mask = (slots <= place) & (segments == segment[:, None])  # [B, S]
        keys = fold_in(dropout_keys, place)
        attended = attend(query[:, :, None], key, value, mask[:, None], dropout_rate=dropout_rate, dropout_keys=keys)
        return attended[:, :, 0]

    queries = jnp.moveaxis(query, 2, 0), segments.T, slots  # [T, B, H, K], [T, B], [T]
    return jnp.moveaxis(jax.lax.map(attend_one, queries, batch_size=QUERY_BLOCK), 0, 2)


def _cudnn(query, key, value, segments):
    """cuDNN's flash attention."""
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))  # [B, T, H, K]
    mask = segments[:, None, :, None] == segments[:, None, None, :]  # [B, 1, T, T]
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=True, scale=1.0, implementation="cudnn"
    ).swapaxes(1, 2)


def _triton(query, key, value, segments, rate, dropout_keys):
    """This project's kernels for GPUs."""
    from transformer_lm import flash_attention

    seeds = jnp.zeros((len(segments), 2), jnp.uint32) if dropout_keys is None else jax.random.key_data(dropout_keys)
    heads = jnp.arange(query.shape[1], dtype=jnp.int32)

    def attend(query, key, value, starts, ends, seeds, heads):
        query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))  # [B, T, H, K]
        places = flash_attention.Places(starts, ends, seeds, heads)
        return flash_attention.attention(query, key, value, places, rate).swapaxes(1, 2)

    return axes.by_device(attend, (HEADS, KEY_HEADS, KEY_HEADS, ROWS, ROWS, ROWS, ("num_heads",)), HEADS)(
        query, key, value, *flash_attention.bounds(segments), seeds, heads
    )


def _tpu(query, key, value, segments):
    """The flash attention that JAX has for TPUs, in blocks of up to 512 tokens."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    _, heads, length, _ = query.shape
    block = math.gcd(length, LARGEST_TPU_BLOCK)
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([splash_attention.CausalMask((length, length))] * heads),
        block_sizes=splash_attention.BlockSizes(*[block] * 8),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=loops.KEPT,
    )
    return jax.vmap(kernel)(query, key, value, splash_attention.SegmentIds(segments, segments))
