"""SentencePiece: ids, encode, decode.

python -m transformer_lm.tokenizer --workdir=logs/my_model --inspect "吾輩は猫である。"
"""

import functools
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import sentencepiece
from etils import epath

from transformer_lm.errors import UserError
from transformer_lm.files import read_at_most

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2  # SentencePiece's own defaults, on which the original's weights rest
START_ID = UNK_ID  # what the network reads before a text's first token, as the original's does
SPACE = "▁"  # U+2581, what SentencePiece writes a space as
NAME_MARK = "\ufdd3"  # ends the names of control pieces in exported tokenizers: a code point that no text holds
MAX_MODEL_BYTES = 256 << 20  # of 256,000 pieces 5 MB are usual
ENCODE_CHARS = 1_000_000  # longer texts are encoded in parts: SentencePiece takes some hundred bytes a character
SURROGATE = re.compile("[\ud800-\udfff]")


def replace_surrogates(text: str) -> str:
    """A text with U+FFFD for each half of a surrogate pair, which a Python string may hold and UTF-8 cannot."""
    return SURROGATE.sub("\ufffd", text)


class Tokenizer:
    """A trained SentencePiece model."""

    def __init__(self, model: bytes, source: str = "SentencePiece model"):
        """`model` holds the bytes of the file `source`, which errors name. Raises UserError if it is no model."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError, MemoryError) as error:
            raise UserError(f"{source} is not a SentencePiece model.") from error
        if not model:  # SentencePiece takes no bytes for an empty model
            raise UserError(f"{source} is empty, and no SentencePiece model.")
        ids = (self._processor.unk_id(), self._processor.bos_id(), self._processor.eos_id())
        if ids != (UNK_ID, BOS_ID, EOS_ID):
            raise UserError(f"{source} has the ids (unk, bos, eos) = {ids}; {(UNK_ID, BOS_ID, EOS_ID)} are needed.")
        self.model, self.source = model, source
        self._with_text: dict[int, bool] = {}  # of the pieces that were asked for
        self.fingerprint = hashlib.sha256(model).hexdigest()

    @classmethod
    def load(cls, path: os.PathLike | str) -> "Tokenizer":
        """Reads a model file, local or remote."""
        path = epath.Path(path)
        if not path.exists():
            raise UserError(f"No tokenizer at {path}.")
        if (model := read_at_most(path, MAX_MODEL_BYTES)) is None:
            raise UserError(f"{path} is not a SentencePiece model: no file, or over {MAX_MODEL_BYTES >> 20} MiB.")
        return cls(model, str(path))

    @classmethod
    def load_for(cls, path: os.PathLike | str, vocab_size: int) -> "Tokenizer":
        """Reads the tokenizer of a model with `vocab_size` ids; raises UserError if it has another number of pieces."""
        loaded = cls.load(path)
        if (pieces := loaded.vocab_size) != vocab_size:
            raise UserError(f"{path} has {pieces} pieces, but the model {vocab_size}: they do not belong together.")
        return loaded

    @property
    def vocab_size(self) -> int:
        """Number of pieces, V."""
        return self._processor.vocab_size()

    @functools.cached_property
    def piece_sizes(self) -> np.ndarray:
        """[V, 2] int32: how many characters and bytes of text each piece stands for.

        A byte piece is one byte, and a character where it begins one; control pieces stand for nothing, unknown ones
        for a character, whose bytes are not known: it is taken for one of three, as most of Japanese.
        """
        spm, sizes = self._processor, np.zeros((self.vocab_size, 2), np.int32)
        for number in range(self.vocab_size):
            piece = spm.id_to_piece(number)
            if spm.is_byte(number):
                sizes[number] = int(piece[3:5], 16) >> 6 != 0b10, 1
            elif spm.is_unknown(number):
                sizes[number] = 1, 3
            elif not spm.is_control(number):
                text = piece.replace(SPACE, " ")
                sizes[number] = len(text), len(text.encode())
        return sizes

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS and EOS."""
        return self._encode([text])[0]

    def _encode(self, texts: list[str], **options) -> list[Any]:
        """What SentencePiece makes of each text; the only way that text goes into it."""
        whole = [replace_surrogates(text) for text in texts]
        try:
            return self._processor.encode(whole, num_threads=1, **options)
        except (RuntimeError, ValueError, MemoryError) as error:
            raise UserError(f"{self.source} cannot encode a text: {' '.join(str(error).split())}") from error

    def encode_texts(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, closed by EOS: int32 arrays [n].

        A text of more than ENCODE_CHARS characters is encoded in parts that end with lines. Its ids are those of the
        whole, since pieces do not cross white space, unless a single line is that long and must be cut elsewhere; or
        unless SentencePiece keeps all white space and adds some before a text, when each part begins with it.
        """
        if any(len(text) > ENCODE_CHARS for text in texts):
            return [self._encode_long(text) for text in texts]
        return self._encode(texts, add_eos=True, return_type="numpy")

    def _encode_long(self, text: str) -> np.ndarray:
        parts = self._encode(list(split_text(text, ENCODE_CHARS)), return_type="numpy")
        return np.concatenate([*parts, [EOS_ID]], dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; control ids such as EOS leave no trace. Raises UserError if one is no piece's."""
        numbers = [int(i) for i in ids]
        if wrong := [i for i in numbers if not 0 <= i < self.vocab_size]:
            raise UserError(f"{self.source} has the ids 0 to {self.vocab_size - 1}; {wrong[0]} is none of them.")
        return self._processor.decode(numbers).replace(SPACE, " ")  # of an alphabet without it, it comes in bytes

    def control_id(self, piece: str) -> int | None:
        """The id of a control piece, which no text becomes; None if there is none of this name."""
        number = self._processor.piece_to_id(piece)
        return number if self._processor.is_control(number) else None

    @functools.cached_property
    def _bytes(self) -> dict[int, int]:
        numbers = range(self.vocab_size)
        return {i: int(self._processor.id_to_piece(i)[3:5], 16) for i in numbers if self._processor.is_byte(i)}

    def byte_of(self, token: int) -> int | None:
        """The byte that a byte piece is; None of other pieces."""
        return self._bytes.get(token)

    def has_text(self, token: int) -> bool:
        """Whether a piece alone is text; a byte piece is not."""
        if (found := self._with_text.get(token)) is None:
            found = self._with_text[token] = self.byte_of(token) is None and bool(self.decode([token]))
        return found

    def piece_text(self, token: int) -> str:
        r"""What a single piece is called: its text with spaces as spaces, of a byte piece bytes:\xe3."""
        byte = self.byte_of(token)
        text = self._processor.id_to_piece(token).replace(SPACE, " ")
        return text if byte is None else f"bytes:\\x{byte:02x}"

    def pieces(self, text: str) -> list[str]:
        """The pieces that a text is cut into."""
        return self._encode([text], out_type=str)[0]


def split_text(text: str, max_chars: int) -> Iterator[str]:
    """Cuts a text into parts of at most `max_chars` characters: after a line end, or anywhere in a longer line."""
    start = 0
    while start < len(text):
        end = min(start + max_chars, len(text))
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end
