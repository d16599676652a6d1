"""Packed rows -> batches, by Grain.

The training batch of step n is a pure function of (rows, seed, batch size, n): whoever asks for it, and after however
many restarts, gets the same rows.
"""

import bisect
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from transformer_lm.data.packing import Row, padding_id, read_records
from transformer_lm.data.rows import PreparedCorpus, PreparedRows, RowsFile
from transformer_lm.errors import UserError
from transformer_lm.files import local_copy
from transformer_lm.tokenizer import Tokenizer

READ_THREADS = 8
PREFETCH_BATCHES = 8
MAX_OPEN_FILES = 128  # of rows, half of what macOS lets a process open; opening one takes 0.2 ms

Batch = dict[str, np.ndarray]


@functools.lru_cache(MAX_OPEN_FILES)
def _open(file: RowsFile) -> ArrayRecordReader:
    """A file's reader, which closes it when it is dropped: however many files a corpus has, few are open.

    A remote file is copied to the cache of this machine when it is first read.
    """
    path = local_copy(file.path, file.size, file.checksum)
    reader = ArrayRecordReader(str(path), "readahead_buffer_size:0", file_reader_buffer_size=32768)
    if reader.num_records() != file.rows:  # of a file that is not there it says 0
        raise UserError(f"{file.path} has {reader.num_records()} rows instead of {file.rows}: begin the run again.")
    return reader


class _Records(Sequence):
    """The records of many files, by number."""

    def __init__(self, files: list[RowsFile]):
        self._files = files
        self._ends = list(itertools.accumulate(file.rows for file in files))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> bytes:
        place = bisect.bisect_right(self._ends, number)
        file = self._files[place]
        return _open(file).read([number - self._ends[place] + file.rows])[0]


def _rows(corpus: PreparedCorpus) -> grain.MapDataset:
    """The corpus's stored rows, uint8."""
    return grain.MapDataset.source(_Records(corpus.files)).map(lambda record: np.frombuffer(record, np.uint8))


def train_batches(
    corpus: PreparedRows,
    *,
    batch_size: int,
    seed: int,
    first_row: int = 0,
    only: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """The endless training batches from row number `first_row` of the shuffled stream on.

    Every epoch of a corpus sees all its rows once, in an order of its own; so does each part of a mixture.

    Args:
      corpus: prepared rows.
      batch_size: rows a step.
      seed: of the order.
      first_row: rows read before.
      only: the rows of each batch, by number, that are read here; None for all.

    Yields:
      what `packing.read_records` makes of these rows.
    """
    only = range(batch_size) if only is None else only
    parts = [_rows(part).shuffle(seed=seed).repeat() for part in corpus.parts]
    rows = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, corpus.weights)

    def read(number: int) -> np.ndarray:
        batch, place = divmod(number, len(only))
        return rows[first_row + batch * batch_size + int(only[place])]

    dataset = grain.MapDataset.range(sys.maxsize).map(read).batch(len(only), drop_remainder=True)
    dataset = dataset.map(lambda records: read_records(records, corpus.dtype))
    options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=PREFETCH_BATCHES * READ_THREADS)
    return iter(dataset.to_iter_dataset(options))


def eval_batches(
    corpus: PreparedRows, *, batch_size: int, max_rows: int, only: Sequence[int] | None = None
) -> Iterator[Batch]:
    """The corpus's rows in order, once, at most `max_rows` (-1: all). The last batch is filled up with padding.

    The parts of a mixture have their shares in any stretch as long as they last. `only` is as in `train_batches`.
    """
    only = range(batch_size) if only is None else only
    parts = [_rows(part) for part in corpus.parts]
    places = [(np.arange(len(part)) + 0.5) / weight for part, weight in zip(parts, corpus.weights, strict=True)]
    rows, order = grain.MapDataset.concatenate(parts), np.argsort(np.concatenate(places), kind="stable")
    stop = len(rows) if max_rows < 0 else min(max_rows, len(rows))
    empty = np.frombuffer(Row(np.full(corpus.row_length, padding_id(corpus.dtype), corpus.dtype)).record(), np.uint8)
    for start in range(0, stop, batch_size):
        numbers = [start + number for number in only]
        yield read_records(np.stack([rows[int(order[i])] if i < stop else empty for i in numbers]), corpus.dtype)


def first_texts(corpus: PreparedCorpus, tokenizer: Tokenizer, rows: int) -> list[str]:
    """What so many rows at a corpus's beginning hold, as its tokenizer writes it: texts, and pieces of long ones."""
    stored = _rows(corpus)
    batch = read_records(np.stack([stored[number] for number in range(min(rows, len(stored)))]), corpus.dtype)
    return [
        tokenizer.decode(targets[segments == number])
        for targets, segments in zip(batch["targets"], batch["segments"], strict=True)
        for number in range(1, segments.max() + 1)
    ]
