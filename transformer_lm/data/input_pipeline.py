"""Packed rows -> batches, by Grain.

The training batch of step n is a pure function of (rows, seed, batch size, n): whoever asks for it, and after however
many restarts, gets the same rows.
"""

import itertools
from collections.abc import Iterator

import grain
import numpy as np

from transformer_lm.data.packing import Row, padding_id, read_records
from transformer_lm.data.rows import PreparedCorpus, PreparedRows
from transformer_lm.files import local_copy

READ_THREADS = 4
PREFETCH_BATCHES = 8

Batch = dict[str, np.ndarray]


def _rows(corpus: PreparedCorpus) -> grain.MapDataset:
    """The corpus's stored rows, uint8. Remote files are copied to the cache of this machine first."""
    source = grain.sources.ArrayRecordDataSource([str(local_copy(path)) for path in corpus.paths])
    return grain.MapDataset.source(source).map(lambda record: np.frombuffer(record, np.uint8))


def _mix(datasets: list[grain.MapDataset], weights: tuple[float, ...]) -> grain.MapDataset:
    """Rows of several datasets, each with its share in any stretch; ends where the first of them does."""
    return datasets[0] if len(datasets) == 1 else grain.MapDataset.mix(datasets, weights)


def train_batches(corpus: PreparedRows, *, batch_size: int, seed: int, first_row: int = 0) -> Iterator[Batch]:
    """The endless training batches from row number `first_row` of the shuffled stream on.

    Every epoch of a corpus sees all its rows once, in an order of its own; so does each part of a mixture.

    Yields:
      what `packing.read_records` makes of batch_size rows.
    """
    parts = [_rows(part).shuffle(seed=seed).repeat() for part in corpus.parts]
    rows = _mix(parts, corpus.weights).slice(slice(first_row, None))
    dataset = rows.batch(batch_size, drop_remainder=True).map(lambda records: read_records(records, corpus.dtype))
    options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=PREFETCH_BATCHES * READ_THREADS)
    return iter(dataset.to_iter_dataset(options))


def eval_batches(corpus: PreparedRows, *, batch_size: int, max_batches: int) -> Iterator[Batch]:
    """The corpus's rows in order, once, at most `max_batches` (-1: all). The last batch is filled up with padding."""
    rows = _mix([_rows(part) for part in corpus.parts], corpus.weights)
    stop = None if max_batches < 0 else max_batches
    empty = Row(np.full(corpus.row_length, padding_id(corpus.dtype), corpus.dtype)).record()
    for start in itertools.islice(range(0, len(rows), batch_size), stop):
        records = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        records += [np.frombuffer(empty, np.uint8)] * (batch_size - len(records))
        yield read_records(np.stack(records), corpus.dtype)
