"""The original's network as a GPT-2.

It is computed by a stock GPT-2 that is a little wider (the proof is in docs/huggingface.md). GPT-2
has no bias on its logits: a dimension that is always 1 must carry it, and must not be seen by anything else. With D our
width and W that of the GPT-2, there are W - D such "ghost" dimensions, and as many heads as a width of W makes:

- Whatever is written to the residual stream carries the mean of its D values in every ghost dimension. So the stream's
  mean over W is its mean over D, and its variance over W is D / W times that over D. LayerNorm computes ours, when its
  scale is multiplied by sqrt(D / W) and its epsilon by D / W.
- Nothing reads the ghosts: their scale in every LayerNorm is 0, and so are the ghost heads' weights.
- In the last LayerNorm one ghost has bias 1: a feature that is always 1, whose weights are the logits' bias.
"""

import numpy as np

from transformer_lm import models
from transformer_lm.huggingface.tensor_tables import SPECIAL_TOKENS, Table, Tensor
from transformer_lm.transformer_config import TransformerConfig

ARCHITECTURE = "GPT2LMHeadModel"  # the class in transformers

# What a network must have to be one; all other fields may be anything.
FIELDS = {
    "norm": ("layer",),
    "positions": ("sinusoidal",),
    "qk_norm": (False,),
    "mlp": ("relu",),
    "use_bias": (True,),
    "logits_soft_cap": (0,),
    "num_kv_heads": (0,),
}
# What else config.json may say.
NEUTRAL = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}


class Sizes:
    """The sizes of a network, and of the smallest GPT-2 that computes it.

    Attributes:
      vocab: V.
      emb: D, our width.
      mlp: F.
      layers: L.
      heads: H, ours.
      head: K.
      all_heads: ours and ghosts.
      width: W = all_heads * K, at least D + 1.
      positions: rows of the table of positions.
    """

    def __init__(self, network: TransformerConfig):
        self.vocab, self.emb, self.mlp = network.vocab_size, network.emb_dim, network.mlp_dim
        self.layers, self.heads = network.num_layers, network.num_heads
        self.head = network.qkv_dim // network.num_heads
        self.all_heads = max(self.heads, self.emb // self.head + 1)
        self.width = self.all_heads * self.head
        self.positions = network.context


def _pad(x: np.ndarray, *shape: int) -> np.ndarray:
    """x at the beginning of zeros of a larger shape."""
    out = np.zeros(shape, np.float32)
    out[tuple(slice(size) for size in x.shape)] = x
    return out


def _with_mean(x: np.ndarray, width: int) -> np.ndarray:
    """[..., D] -> [..., W], the mean of the D values in every ghost."""
    mean = x.mean(axis=-1, keepdims=True, dtype=np.float64).astype(np.float32)
    return np.concatenate([x, np.broadcast_to(mean, (*x.shape[:-1], width - x.shape[-1]))], axis=-1)


def _positions(s: Sizes) -> np.ndarray:
    return _with_mean(models.sinusoidal_positions(s.positions, s.emb), s.width)


def _attention_in(s: Sizes, *kernels: np.ndarray) -> np.ndarray:
    """Query, key and value kernels [D, H, K] -> [W, 3 * W]."""
    flat = [_pad(kernel.reshape(s.emb, s.heads * s.head), s.width, s.width) for kernel in kernels]
    return np.concatenate(flat, axis=1)


def _attention_in_restored(s: Sizes, x: np.ndarray) -> tuple[np.ndarray, ...]:
    parts = np.split(x[: s.emb], 3, axis=1)
    return tuple(part[:, : s.heads * s.head].reshape(s.emb, s.heads, s.head) for part in parts)


def _attention_out(s: Sizes, kernel: np.ndarray) -> np.ndarray:
    """[H, K, D] -> [W, W]."""
    return _pad(_with_mean(kernel.reshape(s.heads * s.head, s.emb), s.width), s.width, s.width)


def _logits(s: Sizes, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """[D, V] and [V] -> [V, W]; the bias are the weights of the first ghost."""
    return _pad(np.concatenate([kernel.T, bias[:, None]], axis=1), s.vocab, s.width)


def _norm(theirs: str, ours: str, constant: float = 0.0) -> tuple[Tensor, Tensor]:
    """A LayerNorm; `constant` is what comes out of it in the first ghost."""
    ratio = lambda s: np.sqrt(s.emb / s.width)  # noqa: E731
    return (
        Tensor(
            f"{theirs}.weight", (f"{ours}.scale",), lambda s: (s.width,),
            lambda s, scale: _pad((scale * ratio(s)).astype(np.float32), s.width),
            lambda s, x: ((x[: s.emb] / ratio(s)).astype(np.float32),),
            rounds=True,
        ),
        Tensor(
            f"{theirs}.bias", (f"{ours}.bias",), lambda s: (s.width,),
            lambda s, bias: _pad(np.append(bias, np.float32(constant)), s.width),
            lambda s, x: (x[: s.emb],),
        ),
    )  # fmt: skip


_BODY = (
    Tensor(
        "transformer.wte.weight", ("embed.embedding",), lambda s: (s.vocab, s.width),
        lambda s, x: _with_mean(x, s.width), lambda s, x: (x[:, : s.emb],),
    ),
    Tensor("transformer.wpe.weight", (), lambda s: (s.positions, s.width), _positions),
    *_norm("transformer.h.{i}.ln_1", "blocks.attention_norm"),
    Tensor(
        "transformer.h.{i}.attn.c_attn.weight",
        ("blocks.attention.query.kernel", "blocks.attention.key.kernel", "blocks.attention.value.kernel"),
        lambda s: (s.width, 3 * s.width), _attention_in, _attention_in_restored,
    ),
    Tensor(
        "transformer.h.{i}.attn.c_attn.bias", (), lambda s: (3 * s.width,),
        lambda s: np.zeros(3 * s.width, np.float32),
    ),
    Tensor(
        "transformer.h.{i}.attn.c_proj.weight", ("blocks.attention.out.kernel",), lambda s: (s.width, s.width),
        _attention_out, lambda s, x: (x[: s.heads * s.head, : s.emb].reshape(s.heads, s.head, s.emb),),
    ),
    Tensor(
        "transformer.h.{i}.attn.c_proj.bias", (), lambda s: (s.width,), lambda s: np.zeros(s.width, np.float32)
    ),
    *_norm("transformer.h.{i}.ln_2", "blocks.mlp_norm"),
    Tensor(
        "transformer.h.{i}.mlp.c_fc.weight", ("blocks.mlp.wi.kernel",), lambda s: (s.width, s.mlp),
        lambda s, x: _pad(x, s.width, s.mlp), lambda s, x: (x[: s.emb],),
    ),
    Tensor(
        "transformer.h.{i}.mlp.c_fc.bias", ("blocks.mlp.wi.bias",), lambda s: (s.mlp,),
        lambda s, x: x, lambda s, x: (x,),
    ),
    Tensor(
        "transformer.h.{i}.mlp.c_proj.weight", ("blocks.mlp.wo.kernel",), lambda s: (s.mlp, s.width),
        lambda s, x: _with_mean(x, s.width), lambda s, x: (x[:, : s.emb],),
    ),
    Tensor(
        "transformer.h.{i}.mlp.c_proj.bias", ("blocks.mlp.wo.bias",), lambda s: (s.width,),
        lambda s, x: _with_mean(x, s.width), lambda s, x: (x[: s.emb],),
    ),
    *_norm("transformer.ln_f", "norm", constant=1.0),
)  # fmt: skip

_LOGITS = Tensor(
    "lm_head.weight", ("logits.kernel", "logits.bias"), lambda s: (s.vocab, s.width),
    _logits, lambda s, x: (x[:, : s.emb].T, x[:, s.emb]),
)  # fmt: skip

_LOGITS_VIA_EMBEDDING = Tensor(
    "lm_head.weight", ("embed.embedding",), lambda s: (s.vocab, s.width),
    lambda s, x: _pad((x / np.sqrt(s.emb)).astype(np.float32), s.vocab, s.width),
)  # fmt: skip


def table(network: TransformerConfig) -> Table:
    """The table of a network."""
    s = Sizes(network)
    settings = {
        "architectures": [ARCHITECTURE],
        "model_type": "gpt2",
        "vocab_size": s.vocab,
        "n_positions": s.positions,
        "n_embd": s.width,
        "n_layer": s.layers,
        "n_head": s.all_heads,
        "n_inner": s.mlp,
        "activation_function": "relu",
        "layer_norm_epsilon": models.NORM_EPSILON * s.emb / s.width,
        "embd_pdrop": network.dropout_rate,
        "resid_pdrop": network.dropout_rate,
        "attn_pdrop": network.attention_dropout_rate,
        "tie_word_embeddings": False,
        **SPECIAL_TOKENS,
    }
    logits = _LOGITS_VIA_EMBEDDING if network.logits_via_embedding else _LOGITS
    return Table(ARCHITECTURE, s, (*_BODY, logits), settings, NEUTRAL)
