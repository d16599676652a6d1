"""Today's network as a Qwen3, tensor for tensor: RMSNorm, rotary positions, normalized queries and keys, gated MLP."""

import numpy as np

from transformer_lm import models
from transformer_lm.huggingface.tensor_tables import SPECIAL_TOKENS, Table, Tensor
from transformer_lm.transformer_config import TransformerConfig

ARCHITECTURE = "Qwen3ForCausalLM"  # the class in transformers
# What a network must have to be one.
FIELDS = {
    "norm": ("rms",),
    "positions": ("rope",),
    "qk_norm": (True,),
    "mlp": ("swiglu",),
    "use_bias": (False,),
    "logits_soft_cap": (0,),
}
# What else config.json may say.
NEUTRAL = {
    "rope_scaling": None,
    "use_sliding_window": False,
    "sliding_window": None,
    "layer_types": ["full_attention"],  # of each layer
}


class Sizes:
    """The sizes of a network.

    Attributes:
      vocab: V.
      emb: D.
      mlp: F.
      layers: L.
      heads: H.
      kv_heads: G.
      head: K.
      positions: the longest text.
    """

    def __init__(self, network: TransformerConfig):
        self.vocab, self.emb, self.mlp = network.vocab_size, network.emb_dim, network.mlp_dim
        self.layers, self.heads, self.kv_heads = network.num_layers, network.num_heads, network.kv_heads
        self.head, self.positions = network.head_size, network.context


def _vector(theirs: str, ours: str, size: str) -> Tensor:
    return Tensor(theirs, (ours,), lambda s: (getattr(s, size),), lambda s, x: x, lambda s, x: (x,))


def _matrix(theirs: str, ours: str, inputs: str, outputs: str) -> Tensor:
    """Ours [in, out], theirs [out, in]."""
    return Tensor(
        theirs, (ours,), lambda s: (getattr(s, outputs), getattr(s, inputs)), lambda s, x: x.T, lambda s, x: (x.T,)
    )


def _into_heads(name: str, heads: str) -> Tensor:
    """Ours [D, heads, K], theirs [heads * K, D]."""
    return Tensor(
        f"model.layers.{{i}}.self_attn.{name[0]}_proj.weight", (f"blocks.attention.{name}.kernel",),
        lambda s: (getattr(s, heads) * s.head, s.emb),
        lambda s, x: x.reshape(s.emb, -1).T, lambda s, x: (x.T.reshape(s.emb, -1, s.head),),
    )  # fmt: skip


_BODY = (
    Tensor(
        "model.embed_tokens.weight", ("embed.embedding",), lambda s: (s.vocab, s.emb),
        lambda s, x: x, lambda s, x: (x,),
    ),
    _vector("model.layers.{i}.input_layernorm.weight", "blocks.attention_norm.scale", "emb"),
    _into_heads("query", "heads"),
    _into_heads("key", "kv_heads"),
    _into_heads("value", "kv_heads"),
    _vector("model.layers.{i}.self_attn.q_norm.weight", "blocks.attention.query_norm.scale", "head"),
    _vector("model.layers.{i}.self_attn.k_norm.weight", "blocks.attention.key_norm.scale", "head"),
    Tensor(
        "model.layers.{i}.self_attn.o_proj.weight", ("blocks.attention.out.kernel",),
        lambda s: (s.emb, s.heads * s.head),
        lambda s, x: x.reshape(-1, s.emb).T, lambda s, x: (x.T.reshape(s.heads, s.head, s.emb),),
    ),
    _vector("model.layers.{i}.post_attention_layernorm.weight", "blocks.mlp_norm.scale", "emb"),
    _matrix("model.layers.{i}.mlp.gate_proj.weight", "blocks.mlp.gate.kernel", "emb", "mlp"),
    _matrix("model.layers.{i}.mlp.up_proj.weight", "blocks.mlp.wi.kernel", "emb", "mlp"),
    _matrix("model.layers.{i}.mlp.down_proj.weight", "blocks.mlp.wo.kernel", "mlp", "emb"),
    _vector("model.norm.weight", "norm.scale", "emb"),
)  # fmt: skip

_LOGITS = _matrix("lm_head.weight", "logits.kernel", "emb", "vocab")

# Ours are divided by sqrt(D), theirs are not: the embedding's tensor cannot serve for both.
_LOGITS_VIA_EMBEDDING = Tensor(
    "lm_head.weight", ("embed.embedding",), lambda s: (s.vocab, s.emb),
    lambda s, x: (x / np.sqrt(s.emb)).astype(np.float32),
)  # fmt: skip


def table(network: TransformerConfig) -> Table:
    """The table of a network."""
    s = Sizes(network)
    settings = {
        "architectures": [ARCHITECTURE],
        "model_type": "qwen3",
        "vocab_size": s.vocab,
        "hidden_size": s.emb,
        "intermediate_size": s.mlp,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head,
        "hidden_act": "silu",
        "max_position_embeddings": s.positions,
        "rms_norm_eps": models.NORM_EPSILON,
        # transformers 5 reads the first, older versions and other tools the second.
        "rope_parameters": {"rope_type": "default", "rope_theta": network.rope_base},
        "rope_theta": network.rope_base,
        "attention_bias": False,
        "attention_dropout": network.attention_dropout_rate,
        "tie_word_embeddings": False,
        **SPECIAL_TOKENS,
    }
    logits = _LOGITS_VIA_EMBEDDING if network.logits_via_embedding else _LOGITS
    neutral = NEUTRAL | {"rope_theta": network.rope_base}  # which rope_parameters says, too
    return Table(ARCHITECTURE, s, (*_BODY, logits), settings, neutral)
