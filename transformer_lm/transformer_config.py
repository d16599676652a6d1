"""All that determines the network of models.py: a frozen dataclass, whose defaults are the original's network."""

import dataclasses
from typing import Annotated, Any

import jax.numpy as jnp

from transformer_lm.attention import check_kind
from transformer_lm.errors import UserError
from transformer_lm.fields import (
    LARGEST,
    Count,
    CountOrZero,
    Length,
    NotNegative,
    Positive,
    Range,
    Rate,
    check,
    check_value,
)

LEAST_SINUSOIDS = 2048  # positions that a table of sinusoids has outside, when it holds fewer here
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# What a field that is a choice may be.
CHOICES = {
    "norm": ("layer", "rms"),
    "positions": ("sinusoidal", "rope"),
    "mlp": ("relu", "relu_squared", "swiglu"),
    "remat": ("none", "block"),
}
# Fields that say how the network is computed or begun, not what it is: a model does not keep them.
MANNER = ("attention", "remat", "zero_init")


def check_dtype(dtype: str):
    """Raises UserError for what a network cannot compute in."""
    check_value("dtype", dtype, str)
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}.")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """All that determines the network."""

    vocab_size: Count  # V
    emb_dim: Annotated[int, Range(least=4, most=LARGEST)] = 512  # width of the residual stream, D
    num_heads: Count = 8  # H; divides qkv_dim
    num_layers: Count = 6  # L
    qkv_dim: Count = 512  # width of queries, keys and values over all heads, H * K
    mlp_dim: Count = 2048  # F
    num_kv_heads: CountOrZero = 0  # G, heads of keys and values, which divide the others; 0 for num_heads
    max_len: Length = 2048  # tokens of the longest text
    norm: str = "layer"  # LayerNorm, or "rms" (Zhang and Sennrich 2019)
    positions: str = "sinusoidal"  # added to embeddings; "rope": queries and keys are rotated (Su et al. 2021)
    rope_base: Positive = 10_000.0  # how many positions, over 2 pi, the slowest rotation takes to come round
    qk_norm: bool = False  # RMSNorm of each query and key (Henry et al. 2020; Dehghani et al. 2023)
    mlp: str = "relu"  # its activation, or "relu_squared" (So et al. 2021), or "swiglu": gated (Shazeer 2020)
    use_bias: bool = True  # in the MLP and the logits
    zero_init: bool = False  # what a block adds, and the logits, begin at zero
    logits_soft_cap: NotNegative = 0.0  # c: logits are c * tanh(logits / c) (Bello et al. 2016); 0 for none
    dropout_rate: Rate = 0.1  # on embeddings, and on what attention and MLP write; in training only
    attention_dropout_rate: Rate = 0.1  # on attention weights; in training only
    logits_via_embedding: bool = False  # logits by the transposed embedding, divided by sqrt(D)
    dtype: str = "float32"  # what the blocks compute in; parameters, logits and softmax are always float32
    attention: str = "auto"  # a kind of attention in attention.py; "auto" for the fastest that there is
    # What each layer keeps for the way back: "none", what `loops.over_layers` finds best; "block", its input alone.
    remat: str = "none"

    def __post_init__(self):
        check(self)
        if self.qkv_dim % self.num_heads:
            raise UserError(
                f"qkv_dim={self.qkv_dim} does not divide by num_heads={self.num_heads}; change one of the two."
            )
        if self.num_heads % self.kv_heads:
            raise UserError(
                f"num_heads={self.num_heads} does not divide by num_kv_heads={self.num_kv_heads}; change one."
            )
        check_dtype(self.dtype)
        check_kind(self.attention)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{name}={getattr(self, name)!r} must be one of {', '.join(choices)}.")
        name, size = ("emb_dim", self.emb_dim) if self.positions == "sinusoidal" else ("head size", self.head_size)
        if size % 2:
            raise UserError(f"{name}={size} must be even: {self.positions} positions need pairs.")

    @property
    def context(self) -> int:
        """Tokens of the longest text that it is used on; sinusoids are computed, so that more only cost space."""
        return max(self.max_len, LEAST_SINUSOIDS) if self.positions == "sinusoidal" else self.max_len

    @property
    def head_size(self) -> int:
        """K."""
        return self.qkv_dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        """G."""
        return self.num_kv_heads or self.num_heads

    def to_json(self) -> dict[str, Any]:
        """What JSON says of the network: all but the manner in which a machine computes it."""
        return {name: value for name, value in vars(self).items() if name not in MANNER}

    @classmethod
    def from_json(cls, values: Any, source: str) -> "TransformerConfig":
        """The network that somebody else's JSON describes; `source` is named in errors.

        Raises:
          UserError: a field is unknown or of another type, or its value impossible.
        """
        if not isinstance(values, dict):
            raise UserError(f"{source} does not describe a network.")
        if unknown := values.keys() - {field.name for field in dataclasses.fields(cls)}:
            raise UserError(f"{source}: {min(unknown)[:80]!r} is no field of the network in this version.")
        if "vocab_size" not in values:
            raise UserError(f"{source}: the network has no vocab_size.")
        own = {name: value for name, value in values.items() if name not in MANNER}
        try:
            return cls(**own)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
