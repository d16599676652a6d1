"""Tables from the tensors of other people's architectures to our parameters, and back: what a table is, and whose."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from transformer_lm.tokenizer import BOS_ID, EOS_ID, START_ID

# SentencePiece's own BOS, which no text holds, is left for padding: without an attention mask transformers takes every
# padding token for padding, which the first token of a text must not be.
SPECIAL_TOKENS = {"bos_token_id": START_ID, "eos_token_id": EOS_ID, "pad_token_id": BOS_ID}


class Sizes(Protocol):
    """The sizes of a network, and of the architecture's network that computes it.

    Attributes:
      layers: L.
      positions: the longest text.
    """

    layers: int
    positions: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A row of a table: a tensor of theirs, and the parameters of ours that it is made of.

    Attributes:
      name: theirs; {i} is the layer.
      ours: dotted names in our tree; () for a tensor that has no parameters of its own.
      shape: sizes -> its shape.
      export: (sizes, *ours) -> theirs; ours are those of one layer.
      restore: (sizes, theirs) -> ours, a tuple; None where `ours` are restored from other tensors.
      rounds: whether `export` rounds; then our own values are kept beside the tensor.
    """

    name: str
    ours: tuple[str, ...]
    shape: Callable[[Any], tuple[int, ...]]
    export: Callable[..., np.ndarray]
    restore: Callable[..., tuple[np.ndarray, ...]] | None = None
    rounds: bool = False

    def count(self, sizes: Sizes) -> int:
        """How many tensors the row stands for: one, or one a layer."""
        return sizes.layers if "{i}" in self.name else 1


@dataclasses.dataclass(frozen=True)
class Table:
    """How an architecture of transformers computes a network of ours.

    Attributes:
      architecture: the class in transformers.
      sizes: what the rows' functions take.
      tensors: the rows.
      settings: what config.json says of the network.
      neutral: what it may say besides, as others do who save the model again: that nothing else is computed.
    """

    architecture: str
    sizes: Sizes
    tensors: tuple[Tensor, ...]
    settings: dict[str, Any]
    neutral: dict[str, Any]
