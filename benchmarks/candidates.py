"""Networks that no recipe offers, for benchmarks/recipes.py: what others have found to help, and no tool can open.

Each is a `TransformerLM` that reads otherwise, with parameters of its own. Training and evaluation alone use them.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_lm import models
from transformer_lm.attention import attend_in_rows
from transformer_lm.models import TransformerConfig, TransformerLM


class _Unrolled(TransformerLM):
    """Layer by layer, with two places to change: what a layer reads, and the values that it attends to."""

    def read(self, inputs, positions, segments, *, dropout_keys=None):
        del dropout_keys  # v2 has no dropout
        first = x = self.begin(self._embed(inputs, positions), positions)
        attend = functools.partial(attend_in_rows, segments=segments, kind=self.config.attention)
        rotation = self._rotation(positions)
        graphdef, stacked = nnx.split(self.blocks)
        for layer in range(self.config.num_layers):
            block = nnx.merge(graphdef, jax.tree.map(lambda p, layer=layer: p[layer], stacked))

            def seeing(query, key, value, *, layer=layer, **options):
                return attend(query, key, self.values(layer, inputs, value), **options)

            x = block(self.mix(layer, x, first), seeing, rotation=rotation)[0]
        return x

    def begin(self, x, positions):
        """What the first layer reads: [B, T, D]."""
        del positions
        return x

    def mix(self, layer, x, first):
        """What a layer reads, of the layer below and of the first's input: [B, T, D]."""
        del layer, first
        return x

    def values(self, layer, inputs, value):
        """The values [B, G, T, K] that a layer attends to."""
        del layer, inputs
        return value


class FirstAgain(_Unrolled):
    """Each layer reads a mixture of the stream and of what the first layer read (Jordan et al., modded-nanogpt)."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.stream = nnx.Param(jnp.ones(config.num_layers))
        self.first = nnx.Param(jnp.full(config.num_layers, 0.1))

    def mix(self, layer, x, first):
        """What a layer reads."""
        return self.stream[layer] * x + self.first[layer] * first


class ValueEmbeddings(_Unrolled):
    """Every other layer, the last among them, adds an embedding of the token to its values (Zhou et al. 2024)."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        width, tables = config.kv_heads * config.head_size, (config.num_layers + 1) // 2
        table = nnx.initializers.normal(1.0)(rngs.params(), (tables, config.vocab_size, width))
        self.embed.values = nnx.Param(table)  # below "embed": with the embedding's learning rate
        self.share = nnx.Param(jnp.zeros(tables))

    def values(self, layer, inputs, value):
        """The values, in every other layer with the tokens' own."""
        if (self.config.num_layers - 1 - layer) % 2:
            return value
        added = self.embed.values[layer // 2][inputs]  # [B, T, G * K]
        added = added.reshape(*inputs.shape, -1, value.shape[-1]).swapaxes(1, 2)
        return value + self.share[layer // 2] * added


class Smear(_Unrolled):
    """Each token's embedding has a share of the one before it in its document (Jordan et al., modded-nanogpt)."""

    GATE = 24  # of the embedding's channels, which say how much

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.gate = nnx.Linear(self.GATE, 1, use_bias=False, kernel_init=nnx.initializers.zeros, rngs=rngs)
        self.share = nnx.Param(jnp.zeros(()))

    def begin(self, x, positions):
        """Embeddings, each with a share of the one before."""
        before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1] * (positions > 0)[..., None]
        return x + self.share[...] * jax.nn.sigmoid(self.gate(x[..., : self.GATE])) * before


NETWORKS = {"": models.TransformerLM, "x0": FirstAgain, "values": ValueEmbeddings, "smear": Smear}
