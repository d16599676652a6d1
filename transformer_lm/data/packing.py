"""How texts lie in fixed-length rows, and how a batch is read back from them.

A row is `row_length` token ids. Texts, each closed by EOS, stand one after the other; what is left over at the end of
a row is filled with the largest number of the row's dtype, which is never a token id. A text that does not fit goes on
in another row, as a segment of its own: nothing is thrown away.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from transformer_lm.tokenizer import EOS_ID

OPEN_ROWS = 64  # rows that wait for a text of the right length; more of them cut fewer texts
MAX_PADDING = 20  # a row is closed when at most row_length // MAX_PADDING slots are free


def row_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype that holds every id below `vocab_size` and the padding: uint16 or uint32."""
    return np.dtype(np.uint16 if vocab_size <= np.iinfo(np.uint16).max else np.uint32)


def padding_id(dtype: np.dtype) -> int:
    """What fills the unused end of a row."""
    return int(np.iinfo(dtype).max)


def pack(texts: Iterable[np.ndarray], row_length: int, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Packs texts into rows: best fit over a bounded number of open rows.

    A text longer than a row is cut into whole rows and a rest. A text, or a rest, is put into the fullest open row
    that still has room for it. When it fits nowhere and `OPEN_ROWS` are open, it fills up the fullest one and goes on
    with what remains of it, so that the padding stays below a 1 / MAX_PADDING share whatever the lengths are.

    Args:
      texts: token ids of each text, EOS included, each [n] of any integer dtype.
      row_length: T.
      dtype: as `row_dtype` gives it.

    Yields:
      rows [T] of dtype.
    """
    open_rows: list[list[np.ndarray]] = []
    free: list[int] = []  # slots left in each open row

    def close(i: int) -> np.ndarray:
        row = np.full(row_length, padding_id(dtype), dtype)
        tokens = np.concatenate(open_rows.pop(i))
        free.pop(i)
        row[: len(tokens)] = tokens
        return row

    for text in texts:
        for start in range(0, len(text), row_length):
            rest = text[start : start + row_length]
            while len(rest):
                fitting = [i for i, room in enumerate(free) if room >= len(rest)]
                if fitting or len(free) == OPEN_ROWS:
                    i = min(fitting or range(len(free)), key=free.__getitem__)
                else:
                    i = len(free)
                    open_rows.append([])
                    free.append(row_length)
                head, rest = rest[: free[i]], rest[free[i] :]
                open_rows[i].append(head)
                free[i] -= len(head)
                if free[i] <= row_length // MAX_PADDING:
                    yield close(i)
    while open_rows:
        yield close(0)


def unpack(rows: np.ndarray) -> dict[str, np.ndarray]:
    """What the network and the loss need of packed rows.

    Args:
      rows: [B, T] uint16 or uint32, as `pack` makes them.

    Returns:
      int32 arrays [B, T]:
        targets: the token ids, 0 on padding.
        inputs: the targets shifted right within their segment; id 0 begins each segment.
        positions: position within the segment, from 0.
        segments: number of the segment in its row, from 1; 0 on padding.
    """
    padding = rows == padding_id(rows.dtype)
    targets = np.where(padding, 0, rows).astype(np.int32)
    starts = np.ones(rows.shape, bool)
    starts[:, 1:] = rows[:, :-1] == EOS_ID
    inputs = np.zeros_like(targets)
    inputs[:, 1:] = targets[:, :-1]
    inputs[starts] = 0
    index = np.arange(rows.shape[1], dtype=np.int32)
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    segments = np.where(padding, 0, np.cumsum(starts, axis=1)).astype(np.int32)
    return {"inputs": inputs, "targets": targets, "positions": positions, "segments": segments}
