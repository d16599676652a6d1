"""From texts, and from conversations, to token ids with what each of them stands for."""

import functools
import json
from typing import NamedTuple

import numpy as np

from transformer_lm.data.packing import UNSCORED
from transformer_lm.tokenizer import EOS_ID, Tokenizer
from transformer_lm.tokenizer.turns import Turns, read_messages


class Encoded(NamedTuple):
    """A text as it is packed.

    Attributes:
      text: all of it.
      tokens: [n, 3] int64: the ids, EOS included, UNSCORED added to those that the loss leaves out; and how many
        characters and bytes of the text each of them stands for, of those left out none.
    """

    text: str
    tokens: np.ndarray


def encode_texts(spm: Tokenizer, texts: list[str]) -> list[Encoded]:
    """Texts, each closed by EOS."""
    ids = spm.encode_texts(texts)
    return [
        Encoded(text, np.concatenate([tokens[:, None], _spread(spm.piece_sizes[tokens], text)], axis=1))
        for tokens, text in zip(ids, texts, strict=True)
    ]


def encode_conversations(spm: Tokenizer, texts: list[str]) -> list[Encoded]:
    """Conversations (JSON of messages), each closed by EOS. Scored is what the assistant says, and the EOS.

    So a model ends its turn by its mark, and then by EOS, which every program takes for the end of a text.
    """
    turns = _turns_of(spm)
    return [_encode_conversation(turns, json.loads(text)) for text in texts]


def _encode_conversation(turns: Turns, messages: list) -> Encoded:
    messages = read_messages(messages)
    ids, is_answer = turns.encode(messages)
    ids, scored = np.array([*ids, EOS_ID], np.int64), np.array([*is_answer, True])
    tokens = np.stack([ids + np.where(scored, 0, UNSCORED), np.zeros_like(ids), np.zeros_like(ids)], axis=1)
    answers = "".join(message.text for message in messages if message.role == "assistant")
    tokens[scored, 1:] = _spread(turns.tokenizer.piece_sizes[ids[scored]], answers)
    return Encoded("".join(message.text for message in messages), tokens)


_turns_of = functools.lru_cache(maxsize=1)(Turns.of)


def _spread(piece_sizes: np.ndarray, text: str) -> np.ndarray:
    """[n, 2] how long tokens' pieces are -> how many characters and bytes of the text each stands for, all of its.

    A piece stands for as much as it is long, but where normalization, unknown pieces or the space in front of a text
    make a difference it is spread over the text.
    """
    sizes = (len(text), len(text.encode()))
    ends = np.cumsum(piece_sizes, axis=0, dtype=np.int64)  # [n, 2]
    total = np.maximum(ends[-1], 1)
    ends = (ends * sizes + total // 2) // total
    ends[-1] = sizes  # also where nothing of a text is left but its EOS
    return np.diff(ends, axis=0, prepend=0)
