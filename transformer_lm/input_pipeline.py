"""Packed rows -> batches, by Grain.

The training batch of step n is a pure function of (rows, seed, batch size, n): whoever asks for it, and after however
many restarts, gets the same rows.
"""

import itertools
from collections.abc import Iterator

import grain
import numpy as np

from transformer_lm.packing import padding_id, unpack
from transformer_lm.preparation import PreparedCorpus

READ_THREADS = 4
PREFETCH_BATCHES = 8

Batch = dict[str, np.ndarray]


def _rows(corpus: PreparedCorpus) -> grain.MapDataset:
    """The corpus's rows, each [T]."""
    source = grain.sources.ArrayRecordDataSource(corpus.paths)
    return grain.MapDataset.source(source).map(lambda record: np.frombuffer(record, corpus.dtype))


def train_batches(corpus: PreparedCorpus, *, batch_size: int, seed: int, start_step: int = 0) -> Iterator[Batch]:
    """The endless training batches from `start_step` on; every epoch sees all rows once, in an order of its own.

    Yields:
      what `packing.unpack` makes of [batch_size, T] rows.
    """
    dataset = _rows(corpus).shuffle(seed=seed).repeat().batch(batch_size, drop_remainder=True).map(unpack)
    options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=PREFETCH_BATCHES * READ_THREADS)
    iterator = iter(dataset.to_iter_dataset(options))
    iterator.set_state({"next_index": start_step})
    return iterator


def eval_batches(corpus: PreparedCorpus, *, batch_size: int, max_batches: int) -> Iterator[Batch]:
    """The corpus's rows in order, once, at most `max_batches` (-1: all). The last batch is filled up with padding."""
    rows = _rows(corpus)
    stop = None if max_batches < 0 else max_batches
    for start in itertools.islice(range(0, len(rows), batch_size), stop):
        batch = np.full((batch_size, corpus.row_length), padding_id(corpus.dtype), corpus.dtype)
        for i in range(start, min(start + batch_size, len(rows))):
            batch[i - start] = rows[i]
        yield unpack(batch)
