"""How texts lie in fixed-length rows, and how a batch is read back from them.

A row is `row_length` token ids. Texts, each closed by EOS, stand one after the other; what is left over at the end of
a row is filled with the largest number of the row's dtype, which is never a token id. A text that does not fit is cut
at the end of a row and goes on at the beginning of another: nothing is thrown away, and whatever stands behind an EOS,
or at the beginning of a row, begins a segment of its own.

A row is stored as a record: `HEADER` numbers, then the ids. The header says which token stood before the row's first
one (START_ID where a text begins there), and how many characters and bytes of text the row stands for.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from transformer_lm.tokenizer import EOS_ID, START_ID

OPEN_ROWS = 64  # rows that wait for a text of the right length; more of them cut fewer texts
MAX_PADDING = 20  # a row is closed when at most row_length // MAX_PADDING slots are free
HEADER = np.dtype([("previous", "<u4"), ("characters", "<u4"), ("bytes", "<u4")])


class Row(NamedTuple):
    """A row with what is known of it.

    Attributes:
      ids: [T] token ids, then padding.
      previous: the token before the first one; START_ID where a text begins.
      characters: characters of text that its tokens stand for.
      bytes: the same in UTF-8.
    """

    ids: np.ndarray
    previous: int
    characters: int
    bytes: int

    def record(self) -> bytes:
        """The row as it is stored."""
        header = np.array((self.previous, self.characters, self.bytes), HEADER)
        return header.tobytes() + self.ids.astype(self.ids.dtype.newbyteorder("<")).tobytes()


def row_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype that holds every id below `vocab_size` and the padding: uint16 or uint32."""
    return np.dtype(np.uint16 if vocab_size <= np.iinfo(np.uint16).max else np.uint32)


def padding_id(dtype: np.dtype) -> int:
    """What fills the unused end of a row."""
    return int(np.iinfo(dtype).max)


def record_bytes(row_length: int, dtype: np.dtype) -> int:
    """Length of a stored row."""
    return HEADER.itemsize + row_length * dtype.itemsize


def pack(texts: Iterable[np.ndarray], row_length: int, dtype: np.dtype) -> Iterator[Row]:
    """Packs texts into rows: best fit over a bounded number of open rows.

    A text is put into the fullest open row that still has room for it, or begins a new one. When it fits nowhere and
    `OPEN_ROWS` are open, its beginning fills up the fullest one, so that the padding stays below a 1 / MAX_PADDING
    share whatever the lengths are. Of what remains, and of a text longer than a row, whole rows are cut off, and the
    rest begins a new row: a piece that is not its text's last one ends with its row.

    Args:
      texts: of each text [n, 3] integers: the token ids, EOS included, and how many characters and bytes of the text
        each of them stands for.
      row_length: T.
      dtype: as `row_dtype` gives it.

    Yields:
      rows, ids [T] of dtype.
    """
    open_rows: list[list[np.ndarray]] = []
    previous: list[int] = []  # the token before each open row
    free: list[int] = []  # slots left in each open row

    def begin(piece: np.ndarray, before: int):
        open_rows.append([piece])
        previous.append(before)
        free.append(row_length - len(piece))

    def close(i: int) -> Row:
        tokens = np.concatenate(open_rows.pop(i))
        free.pop(i)
        ids = np.full(row_length, padding_id(dtype), dtype)
        ids[: len(tokens)] = tokens[:, 0]
        return Row(ids, previous.pop(i), *(int(count) for count in tokens[:, 1:].sum(axis=0)))

    for text in texts:
        fitting = [i for i, room in enumerate(free) if room >= len(text)]
        if fitting:
            i = min(fitting, key=free.__getitem__)
            open_rows[i].append(text)
            free[i] -= len(text)
            if free[i] <= row_length // MAX_PADDING:
                yield close(i)
            continue
        start, before = 0, START_ID
        if len(free) == OPEN_ROWS:
            i = min(range(len(free)), key=free.__getitem__)
            start = free[i]
            open_rows[i].append(text[:start])
            yield close(i)
        while start < len(text):
            piece = text[start : start + row_length]
            begin(piece, before if start == 0 else int(text[start - 1, 0]))
            start += row_length
            if free[-1] <= row_length // MAX_PADDING:
                yield close(len(free) - 1)
    while open_rows:
        yield close(0)


def read_records(records: np.ndarray, dtype: np.dtype) -> dict[str, np.ndarray]:
    """What the network and the loss need of stored rows.

    Args:
      records: [B, `record_bytes`] uint8.
      dtype: of the rows.

    Returns:
      what `unpack` makes of the rows, and int32 arrays [B], characters and bytes of text that each stands for.
    """
    header = np.ascontiguousarray(records[:, : HEADER.itemsize]).view(HEADER)[:, 0]
    rows = np.ascontiguousarray(records[:, HEADER.itemsize :]).view(dtype.newbyteorder("<"))
    counts = {name: header[name].astype(np.int32) for name in ("characters", "bytes")}
    return unpack(rows, header["previous"]) | counts


def unpack(rows: np.ndarray, previous: np.ndarray | int = START_ID) -> dict[str, np.ndarray]:
    """What the network and the loss need of packed rows.

    Args:
      rows: [B, T] uint16 or uint32, as `pack` makes them.
      previous: [B], the token before each row's first one; START_ID where a text begins.

    Returns:
      int32 arrays [B, T]:
        targets: the token ids, 0 on padding.
        inputs: the targets shifted right within their segment; START_ID begins each text.
        positions: position within the segment, from 0.
        segments: number of the segment in its row, from 1; 0 on padding.
    """
    padding = rows == padding_id(rows.dtype)
    targets = np.where(padding, 0, rows).astype(np.int32)
    starts = np.ones(rows.shape, bool)
    starts[:, 1:] = rows[:, :-1] == EOS_ID
    inputs = np.zeros_like(targets)
    inputs[:, 1:] = targets[:, :-1]
    inputs[starts] = START_ID
    inputs[:, 0] = previous
    index = np.arange(rows.shape[1], dtype=np.int32)
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    segments = np.where(padding, 0, np.cumsum(starts, axis=1)).astype(np.int32)
    return {"inputs": inputs, "targets": targets, "positions": positions, "segments": segments}
