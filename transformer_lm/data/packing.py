"""How texts lie in fixed-length rows, and how a batch is read back from them.

A row is `row_length` token ids. Texts, each closed by EOS, stand one after the other; what is left over at the end of
a row is filled with the largest number of the row's dtype, which is never a token id. A text that does not fit is cut:
a piece that is not its text's last one ends with its row, so that whatever stands behind an EOS, or at the beginning of
a row, is a segment of its own. Nothing is thrown away.

A row is stored as a record: `HEADER`, then the ids. The header says which token stood before a piece that goes on with
a text (at most MAX_CONTINUED of them a row), and how many characters and bytes of text the row stands for.

Of conversations the loss counts some tokens alone. The others have UNSCORED added to their ids; such rows are uint32.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from transformer_lm.tokenizer import EOS_ID, START_ID

OPEN_ROWS = 64  # rows that wait for a text of the right length; more of them cut fewer texts
MAX_PADDING = 20  # a row is closed when at most row_length // MAX_PADDING slots are free
MAX_CONTINUED = 4  # pieces of a row that go on with a text
UNSCORED = 1 << 31  # added to the ids of tokens that the loss leaves out
HEADER = np.dtype(
    [("characters", "<u4"), ("bytes", "<u4"), ("slots", "<u4", MAX_CONTINUED), ("previous", "<u4", MAX_CONTINUED)]
)


class Row(NamedTuple):
    """A row with what is known of it.

    Attributes:
      ids: [T] token ids, UNSCORED added to some, then padding.
      characters: characters of text that its tokens stand for.
      bytes: the same in UTF-8.
      continued: (slot, token before it) of each piece that goes on with a text.
    """

    ids: np.ndarray
    characters: int = 0
    bytes: int = 0
    continued: tuple[tuple[int, int], ...] = ()

    def record(self) -> bytes:
        """The row as it is stored."""
        header = np.zeros((), HEADER)
        header["characters"], header["bytes"] = self.characters, self.bytes
        for number, (slot, token) in enumerate(self.continued):
            header["slots"][number], header["previous"][number] = slot, token
        return header.tobytes() + self.ids.astype(self.ids.dtype.newbyteorder("<")).tobytes()


def row_dtype(vocab_size: int, has_unscored: bool = False) -> np.dtype:
    """The smallest dtype that holds every id below `vocab_size`, UNSCORED if need be, and the padding."""
    return np.dtype(np.uint16 if vocab_size <= np.iinfo(np.uint16).max and not has_unscored else np.uint32)


def padding_id(dtype: np.dtype) -> int:
    """What fills the unused end of a row."""
    return int(np.iinfo(dtype).max)


class _OpenRow:
    """A row with room for more."""

    def __init__(self, row_length: int):
        self.free = row_length
        self._row_length = row_length
        self._pieces: list[np.ndarray] = []
        self.continued: list[tuple[int, int]] = []

    def add(self, piece: np.ndarray, previous: int):
        """Puts a piece [n, 3] behind what is there."""
        if previous != START_ID:
            self.continued.append((self._row_length - self.free, previous))
        self._pieces.append(piece)
        self.free -= len(piece)

    def close(self, dtype: np.dtype) -> Row:
        """The row, filled up with padding."""
        tokens = np.concatenate(self._pieces)
        ids = np.full(self._row_length, padding_id(dtype), dtype)
        ids[: len(tokens)] = tokens[:, 0]
        characters, size = tokens[:, 1:].sum(axis=0)
        return Row(ids, int(characters), int(size), tuple(self.continued))


def pack(texts: Iterable[np.ndarray], row_length: int, dtype: np.dtype) -> Iterator[Row]:
    """Packs texts into rows: best fit over a bounded number of open rows.

    A text, or the rest of one, is put into the fullest open row that still has room for it. When it fits nowhere, it
    begins a new row, or, when `OPEN_ROWS` are open, its beginning fills up the fullest one; what remains of it is put
    elsewhere. So the padding stays below a 1 / MAX_PADDING share whatever the lengths are.

    Args:
      texts: of each text [n, 3] integers: the token ids, EOS included, UNSCORED added to some, and how many characters
        and bytes of the text each of them stands for.
      row_length: T.
      dtype: as `row_dtype` gives it.

    Yields:
      rows, ids [T] of dtype.
    """
    rows: list[_OpenRow] = []
    for text in texts:
        start, previous = 0, START_ID
        while start < len(text):
            row = _choose(rows, min(len(text) - start, row_length), previous, row_length)
            piece = text[start : start + row.free]
            row.add(piece, previous)
            start += len(piece)
            previous = int(piece[-1, 0]) % UNSCORED
            if row.free <= row_length // MAX_PADDING:
                rows.remove(row)
                yield row.close(dtype)
    for row in rows:
        yield row.close(dtype)


def _choose(rows: list[_OpenRow], length: int, previous: int, row_length: int) -> _OpenRow:
    """The row for a piece: the fullest that has room for all of it, else a new one, else the fullest of all."""
    allowed = [row for row in rows if previous == START_ID or len(row.continued) < MAX_CONTINUED]
    fitting = [row for row in allowed if row.free >= length]
    if not fitting and (len(rows) < OPEN_ROWS or not allowed):
        rows.append(_OpenRow(row_length))
        return rows[-1]
    return min(fitting or allowed, key=lambda row: row.free)


def read_records(records: np.ndarray, dtype: np.dtype) -> dict[str, np.ndarray]:
    """What the network and the loss need of stored rows.

    Args:
      records: [B, bytes of a record] uint8.
      dtype: of the rows.

    Returns:
      what `unpack` makes of the rows, but that a piece which goes on with a text begins with the token before it; and
      int32 arrays [B], characters and bytes of text that each row stands for.
    """
    header = np.ascontiguousarray(records[:, : HEADER.itemsize]).view(HEADER)[:, 0]
    rows = np.ascontiguousarray(records[:, HEADER.itemsize :]).view(dtype.newbyteorder("<"))
    batch = unpack(rows)
    numbers, entries = np.nonzero(header["previous"])  # START_ID, 0, stands where no piece goes on with a text
    batch["inputs"][numbers, header["slots"][numbers, entries]] = header["previous"][numbers, entries]
    return batch | {name: header[name].astype(np.int32) for name in ("characters", "bytes")}


def unpack(rows: np.ndarray) -> dict[str, np.ndarray]:
    """What the network and the loss need of packed rows in which every piece begins a text.

    Args:
      rows: [B, T] uint16 or uint32 ids, UNSCORED added to some, and padding.

    Returns:
      int32 arrays [B, T], the last one bool:
        targets: the token ids, 0 on padding.
        inputs: the targets shifted right within their segment; START_ID begins each segment.
        positions: position within the segment, from 0.
        segments: number of the segment in its row, from 1; 0 on padding.
        scored: whether the loss counts the target.
    """
    padding = rows == padding_id(rows.dtype)
    scored = ~padding & (rows < UNSCORED)
    targets = np.where(padding, 0, rows.astype(np.uint32) % UNSCORED).astype(np.int32)
    starts = np.ones(rows.shape, bool)
    starts[:, 1:] = targets[:, :-1] == EOS_ID
    inputs = np.zeros_like(targets)
    inputs[:, 1:] = targets[:, :-1]
    inputs[starts] = START_ID
    index = np.arange(rows.shape[1], dtype=np.int32)
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    segments = np.where(padding, 0, np.cumsum(starts, axis=1)).astype(np.int32)
    return {"inputs": inputs, "targets": targets, "positions": positions, "segments": segments, "scored": scored}
