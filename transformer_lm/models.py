"""The network: a decoder-only Transformer language model in Flax NNX, and nothing else.

With every field of `TransformerConfig` at its default it is, parameter for parameter, the network of Flax's lm1b
example and of the original transformer-lm-japanese: pre-LayerNorm blocks of bias-free self-attention and a ReLU MLP,
fixed sinusoidal positions, untied logits with a bias. Other values make it one of today: RMSNorm, rotary positions,
normalized queries and keys, a gated MLP, no biases.

Letters in shapes: B batch, T length, D emb_dim, H heads, G heads of keys and values, K head size, F mlp_dim,
V vocabulary, S cache slots, L layers.

Parameters travel as a plain nested dict of arrays. The layers' parameters are stacked along a leading axis L and run
under `jax.lax.scan`, so that a network of 24 layers compiles as fast as one of one layer.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from transformer_lm.attention import attend, attend_in_rows, attend_to_filled
from transformer_lm.axes import named
from transformer_lm.dropout import Keys, dropout, split
from transformer_lm.loops import over_layers
from transformer_lm.products import Transposed, add_bias, dot_general, dot_general_of_transposed
from transformer_lm.transformer_config import DTYPES, TransformerConfig

NORM_EPSILON = 1e-6
ACTIVATIONS = {"relu": jax.nn.relu, "relu_squared": lambda x: jnp.square(jax.nn.relu(x)), "swiglu": jax.nn.silu}
# Names of the parameters' axes, by the end of a parameter's path; in front of a block's stands that of the layers.
# Parameters that are not here, vectors as long as the residual stream, are never cut.
PARAMETER_AXES = {
    ("embed", "embedding"): ("vocab_size", "emb_dim"),
    ("query", "kernel"): ("emb_dim", "num_heads", None),
    ("key", "kernel"): ("emb_dim", "kv_heads", None),
    ("value", "kernel"): ("emb_dim", "kv_heads", None),
    ("out", "kernel"): ("num_heads", None, "emb_dim"),
    ("wi", "kernel"): ("emb_dim", "mlp_dim"),
    ("wi", "bias"): ("mlp_dim",),
    ("gate", "kernel"): ("emb_dim", "mlp_dim"),
    ("gate", "bias"): ("mlp_dim",),
    ("wo", "kernel"): ("mlp_dim", "emb_dim"),
    ("logits", "kernel"): ("emb_dim", "vocab_size"),
    ("logits", "bias"): ("vocab_size",),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens read so far, for decoding; made by `empty_cache`.

    Attributes:
      keys: one array a layer, [B, G, S, K].
      values: one array a layer, [B, G, S, K].
      valid: [B, S] bool, which slots hold a token that may be attended to (padding of a prompt may not).
      length: int32, number of slots filled: a scalar, or one a row [B] where rows began at different times.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    valid: jax.Array
    length: jax.Array


def empty_cache(config: TransformerConfig, batch_size: int, slots: int) -> Cache:
    """A cache of `slots` tokens for each of `batch_size` rows."""
    shape = (batch_size, config.kv_heads, slots, config.head_size)
    zeros = tuple(jnp.zeros(shape, DTYPES[config.dtype]) for _ in range(config.num_layers))
    return Cache(zeros, zeros, jnp.zeros((batch_size, slots), bool), jnp.zeros((), jnp.int32))


def write_slots(array, update, start, axis: int):
    """The array [B, ...] with the update [B, ...] in it from slot `start` on, a scalar or one a row [B]."""
    if jnp.ndim(start) == 0:
        return jax.lax.dynamic_update_slice_in_dim(array, update, start, axis)
    return jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis - 1))(array, update, start)


def sinusoidal_positions(max_len: int, emb_dim: int) -> np.ndarray:
    """The fixed position table: [max_len, emb_dim] float32, first half sines, second half cosines.

    Frequencies are exp(-ln(10000) / (emb_dim / 2 - 1) * i), as in tensor2tensor and Flax's lm1b example (Vaswani et
    al. 2017, section 3.5, with sines and cosines side by side rather than interleaved).
    """
    half = emb_dim // 2
    frequencies = np.exp(-np.log(10000.0) / (half - 1) * np.arange(half))
    angles = np.arange(max_len)[:, None] * frequencies  # [max_len, half]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def rotations(config: TransformerConfig, positions) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the angles by which rotary positions [B, T] turn: two [B, 1, T, K / 2] float32."""
    frequencies = config.rope_base ** (-np.arange(0, config.head_size, 2, np.float32) / config.head_size)  # [K / 2]
    angles = positions[:, None, :, None].astype(jnp.float32) * frequencies.astype(np.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x, rotation):
    """Turns the pairs (i, i + K / 2) of queries or keys [B, H, T, K]; without a rotation, x as it is."""
    if rotation is None:
        return x
    cosine, sine = (part.astype(x.dtype) for part in rotation)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def kernel_init(config: TransformerConfig, *, last: bool = False) -> nnx.Initializer:
    """How a matrix begins; `last` for those whose products are added to the residual stream, or are the logits."""
    return nnx.initializers.zeros if last and config.zero_init else nnx.initializers.xavier_uniform()


class Dense(nnx.Linear):
    """As nnx.Linear, with `add_bias`."""

    def __call__(self, x):
        """[..., in] -> [..., out]."""
        bias = None if self.bias is None else self.bias[...]
        x, kernel = self.promote_dtype((x, self.kernel[...]), dtype=self.dtype)
        last = (((x.ndim - 1,), (0,)), ((), ()))
        product = self.dot_general(x, kernel, last, preferred_element_type=self.preferred_element_type)
        return product if bias is None else add_bias(product, bias.astype(product.dtype))


class Attention(nnx.Module):
    """Multi-head self-attention without biases (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.dropout_rate = config.attention_dropout_rate
        dense = functools.partial(
            nnx.LinearGeneral, use_bias=False, dtype=DTYPES[config.dtype], dot_general=dot_general, rngs=rngs
        )
        heads, kv_heads = (config.num_heads, config.head_size), (config.kv_heads, config.head_size)
        self.query = dense(config.emb_dim, heads, kernel_init=kernel_init(config))
        self.key = dense(config.emb_dim, kv_heads, kernel_init=kernel_init(config))
        self.value = dense(config.emb_dim, kv_heads, kernel_init=kernel_init(config))
        self.out = dense(heads, config.emb_dim, axis=(-2, -1), kernel_init=kernel_init(config, last=True))
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.query_norm, self.key_norm = (make_norm("rms", config.head_size, config, rngs) for _ in range(2))

    def __call__(self, x, attend, *, rotation=None, dropout_keys: Keys = None, cache=None):
        """x [B, T, D] -> [B, T, D] and the (keys, values) attended to.

        Args:
          x: [B, T, D].
          attend: (query, key, value, dropout_rate, dropout_keys) -> [B, H, T, K]; knows which tokens are seen.
          rotation: as `rotations` gives it, where positions are rotary.
          dropout_keys: one a row [B].
          cache: (keys, values, start): keys and values [B, G, S, K], into which this call's are written from slot
            `start` on, a scalar or one a row [B].
        """
        # Heads before tokens: as plain matrix products attention is a fifth faster on CPU.
        query = named(self.query(x).swapaxes(1, 2), "batch", "num_heads", None, None)  # [B, H, T, K]
        key, value = (
            named(project(x).swapaxes(1, 2), "batch", "kv_heads", None, None) for project in (self.key, self.value)
        )  # [B, G, T, K]
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = rotate(query, rotation), rotate(key, rotation)
        if cache is not None:
            keys, values, start = cache
            key = write_slots(keys, key.astype(keys.dtype), start, axis=2)  # [B, G, S, K]
            value = write_slots(values, value.astype(values.dtype), start, axis=2)
        query = query / np.sqrt(query.shape[-1]).astype(query.dtype)
        attended = attend(query, key, value, dropout_rate=self.dropout_rate, dropout_keys=dropout_keys)
        return self.out(attended.swapaxes(1, 2)), (key, value)


class MlpBlock(nnx.Module):
    """Dense, activation, dropout, Dense; gated: what is activated multiplies a second Dense."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.dropout_rate = config.dropout_rate
        self.activate, self.gated = ACTIVATIONS[config.mlp], config.mlp == "swiglu"
        dense = functools.partial(
            Dense,
            use_bias=config.use_bias,
            bias_init=nnx.initializers.normal(1e-6),
            dtype=DTYPES[config.dtype],
            dot_general=dot_general,
            rngs=rngs,
        )
        self.wi = dense(config.emb_dim, config.mlp_dim, kernel_init=kernel_init(config))
        self.wo = dense(config.mlp_dim, config.emb_dim, kernel_init=kernel_init(config, last=True))
        if self.gated:
            self.gate = dense(config.emb_dim, config.mlp_dim, kernel_init=kernel_init(config))

    def __call__(self, x, *, dropout_keys: Keys = None):
        """x [B, T, D] -> [B, T, D]."""
        hidden = self.activate(self.gate(x)) * self.wi(x) if self.gated else self.activate(self.wi(x))
        hidden = named(hidden, "batch", None, "mlp_dim")  # [B, T, F]
        return self.wo(dropout(hidden, self.dropout_rate, dropout_keys))


def make_norm(kind: str, width: int, config: TransformerConfig, rngs: nnx.Rngs) -> nnx.LayerNorm | nnx.RMSNorm:
    """A normalization of activations [..., width], whose scale and bias stay float32, as the original's do."""
    norm = nnx.LayerNorm if kind == "layer" else nnx.RMSNorm
    return norm(width, epsilon=NORM_EPSILON, dtype=DTYPES[config.dtype], promote_dtype=_as_they_are, rngs=rngs)


def _as_they_are(arrays: tuple, *, dtype: Any) -> tuple:
    del dtype  # of the result alone
    return arrays


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.dropout_rate = config.dropout_rate
        self.attention_norm = make_norm(config.norm, config.emb_dim, config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = make_norm(config.norm, config.emb_dim, config, rngs)
        self.mlp = MlpBlock(config, rngs=rngs)

    def __call__(self, x, attend, *, rotation=None, dropout_keys: Keys = None, cache=None):
        """x [B, T, D] -> x [B, T, D] and the keys and values, as in `Attention`."""
        keys = split(dropout_keys, 4)
        attended, keys_values = self.attention(
            self.attention_norm(x), attend, rotation=rotation, dropout_keys=keys[0], cache=cache
        )
        x = x + dropout(attended, self.dropout_rate, keys[1])
        x = x + dropout(self.mlp(self.mlp_norm(x), dropout_keys=keys[2]), self.dropout_rate, keys[3])
        return named(x, "batch", None, None), keys_values


class TransformerLM(nnx.Module):
    """Token ids in, logits for the next token out."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(
            config.vocab_size, config.emb_dim, embedding_init=nnx.initializers.normal(1.0), rngs=rngs
        )
        make_block = nnx.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))
        self.blocks = make_block(jax.random.split(rngs.params(), config.num_layers))  # parameters stacked: [L, ...]
        self.norm = make_norm(config.norm, config.emb_dim, config, rngs)
        if not config.logits_via_embedding:
            self.logits = Dense(
                config.emb_dim,
                config.vocab_size,
                use_bias=config.use_bias,
                kernel_init=kernel_init(config, last=True),
                bias_init=nnx.initializers.normal(1e-6),
                dtype=DTYPES[config.dtype],
                preferred_element_type=jnp.float32,
                dot_general=dot_general,
                rngs=rngs,
            )

    def __call__(self, inputs, positions, segments, *, dropout_keys: Keys = None):
        """Logits for every position of packed rows.

        Args:
          inputs: [B, T] int32, the targets shifted right within their segment; id 0 begins a segment.
          positions: [B, T] int32, position within the segment, from 0.
          segments: [B, T] int32, which text of the row a token belongs to, from 1; 0 is padding.
          dropout_keys: one PRNG key a row [B] in training; None switches dropout off.

        Returns:
          logits [B, T, V] float32. A token sees itself and what stands before it in its own segment.
        """
        return self.to_logits(self.read(inputs, positions, segments, dropout_keys=dropout_keys))

    def read(self, inputs, positions, segments, *, dropout_keys: Keys = None, for_gradient: bool = False):
        """As a call, but what logits are made of: [B, T, D]; `for_gradient`: for one to be taken sooner."""
        embed_keys, blocks_keys = split(dropout_keys, 2)
        x = self._embed(inputs, positions, embed_keys)
        attend = functools.partial(attend_in_rows, segments=segments, kind=self.config.attention)
        rotation = self._rotation(positions)
        graphdef, stacked = nnx.split(self.blocks)

        def run_layer(x, layer):
            params, keys = layer
            return nnx.merge(graphdef, params)(x, attend, rotation=rotation, dropout_keys=keys)[0], None

        keys = None if blocks_keys is None else split(blocks_keys, self.config.num_layers)  # [L, B]
        return over_layers(run_layer, x, (stacked, keys), for_gradient=for_gradient, remat=self.config.remat)[0]

    def extend(self, inputs, positions, valid, cache: Cache) -> tuple[jax.Array, Cache]:
        """As `read_on`, but logits [B, V] float32 for the token after the last."""
        x, cache = self.read_on(inputs, positions, valid, cache)
        return self.to_logits(x[:, -1]), cache

    def read_on(self, inputs, positions, valid, cache: Cache) -> tuple[jax.Array, Cache]:
        """Reads T more tokens into the cache: a whole prompt (T = its length) or one token (T = 1).

        Layers are unrolled here: a decoding step is bound by reading the weights, which scan would copy first. The
        parameters may be those of `for_decoding`.

        Args:
          inputs: [B, T] int32 ids. Rows of different lengths are padded on the left.
          positions: [B, T] int32.
          valid: [B, T] bool, False on padding; of a row without any token the results mean nothing.
          cache: as made by `empty_cache`, with at least T free slots.

        Returns:
          what logits are made of [B, T, D], and the cache with the T tokens in it.
        """
        length = inputs.shape[1]
        is_read, valid = valid.any(axis=1), write_slots(cache.valid, valid, cache.length, axis=1)  # [B], [B, S]
        slots = jnp.arange(valid.shape[1])
        mask = (slots <= cache.length[..., None, None] + jnp.arange(length)[:, None]) & valid[:, None, :]  # [B, T, S]
        seen = functools.partial(attend, mask=mask)
        if cache.length.ndim:
            filled = jnp.minimum(jnp.where(is_read, cache.length, 0).max() + length, len(slots))
            seen = functools.partial(attend_to_filled, mask=mask, filled=filled)
        x = self._embed(inputs, positions)
        rotation = self._rotation(positions)
        graphdef, stacked = nnx.split(self.blocks)

        @jax.jit  # within another: traced once for all layers, and then part of the whole
        def run_layer(x, params, keys, values):
            return nnx.merge(graphdef, params)(x, seen, rotation=rotation, cache=(keys, values, cache.length))

        keys_values = []
        for i, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
            one = jax.tree.map(lambda p, i=i: p[i], stacked, is_leaf=lambda p: isinstance(p, tuple))
            x, layer_keys_values = run_layer(x, one, keys, values)
            keys_values.append(layer_keys_values)
        keys, values = zip(*keys_values, strict=True)
        return x, Cache(keys, values, valid, cache.length + length)

    def _embed(self, inputs, positions, dropout_keys: Keys = None):
        """[B, T] ids and positions -> [B, T, D]."""
        embedding = named(self.embed.embedding[...], "vocab_size", None)  # whole rows, where they are looked up
        x = named(embedding[inputs], "batch", None, None)
        if self.config.positions == "sinusoidal":
            x += jnp.asarray(sinusoidal_positions(self.config.max_len, self.config.emb_dim))[positions]
        return dropout(x, self.config.dropout_rate, dropout_keys).astype(DTYPES[self.config.dtype])

    def _rotation(self, positions):
        return rotations(self.config, positions) if self.config.positions == "rope" else None

    def to_logits(self, x):
        """What `read` returns, or some of it: [..., D] -> logits [..., V] float32."""
        x = self.norm(x)
        if self.config.logits_via_embedding:
            embedding = self.embed.embedding[...].astype(x.dtype)
            last = (((x.ndim - 1,), (0,)), ((), ()))
            logits = dot_general_of_transposed(x, embedding.T, last, preferred_element_type=jnp.float32)
            logits /= np.sqrt(self.config.emb_dim).astype(np.float32)
        else:
            logits = self.logits(x).astype(jnp.float32)
        cap = self.config.logits_soft_cap
        return cap * jnp.tanh(logits / cap) if cap else logits


Params = dict[str, Any]


def init(config: TransformerConfig, key: jax.Array) -> Params:
    """Fresh parameters, float32, as a nested dict. Pure: may run under `jax.jit` or `jax.eval_shape`."""
    return nnx.to_pure_dict(nnx.filter_state(_made(config, key)[1], nnx.Param))


@functools.partial(jax.jit, static_argnums=0)  # within another, or looked at abstractly: traced once
def _made(config: TransformerConfig, key: jax.Array) -> tuple[nnx.GraphDef, nnx.State]:
    """A fresh network, split."""
    return nnx.split(TransformerLM(config, rngs=nnx.Rngs(key)))


def head(config: TransformerConfig, params: Params) -> Params:
    """Those of the parameters that `to_logits` reads."""
    return {name: params[name] for name in ("norm", "embed" if config.logits_via_embedding else "logits")}


@jax.jit  # one program, not one for each array and layer
def for_decoding(params: Params) -> Params:
    """The parameters as is best for reading one token at a time, which only `extend` and `read_on` take so.

    Each layer has arrays of its own, since cutting them out of one for all layers would cost as much as what is
    computed with them. Matrices lie transposed: a CPU reads them so at its memory's bandwidth, else at less than half.
    """

    def turn(path, array):
        *_, module, name = (entry.key for entry in path)
        num_in = 2 if module == "out" else 1

        def arrange(array):
            return Transposed.of(array, num_in) if name == "kernel" else array

        return tuple(map(arrange, array)) if path[0].key == "blocks" else arrange(array)

    return jax.tree.map_with_path(turn, params)


def bind(config: TransformerConfig, params: Params) -> TransformerLM:
    """The network with these parameters in it, ready to be called; with `head` alone, to make logits only.

    What lies transposed is best bound where it is used: in a loop, not before it.
    """
    leaves, tree = jax.tree.flatten(params, is_leaf=_is_transposed)
    graphdef, state = _abstract(config, any(map(_is_transposed, leaves)))
    state = jax.tree.map(lambda x: x, state)
    kernels = tree.unflatten([leaf.kernel if _is_transposed(leaf) else leaf for leaf in leaves])
    nnx.replace_by_pure_dict(state, kernels)
    return nnx.merge(graphdef, state)


def _is_transposed(leaf) -> bool:
    return isinstance(leaf, Transposed)


@functools.lru_cache(8)
def _abstract(config: TransformerConfig, transposed: bool = False) -> tuple[nnx.GraphDef, nnx.State]:
    """The network with shapes and dtypes for parameters, split; `transposed` says how its kernels lie."""
    if not transposed:
        return jax.eval_shape(functools.partial(_made, config), jax.eval_shape(lambda: jax.random.key(0)))
    network = nnx.merge(*_abstract(config))
    network.set_attributes(dot_general=dot_general_of_transposed)
    return nnx.split(network)


def abstract_params(config: TransformerConfig) -> Params:
    """Shapes and dtypes of the parameters, without making them."""
    return nnx.to_pure_dict(nnx.filter_state(_abstract(config)[1], nnx.Param))


def count_params(config: TransformerConfig) -> int:
    """Number of parameters of the network."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))
