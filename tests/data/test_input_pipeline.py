"""Batches: a pure function of the seed and the step."""

import collections
import itertools
import os
import resource

import numpy as np
import pytest
from test_preparation import batch_of_all, data_config

from transformer_lm.data import input_pipeline, preparation, rows
from transformer_lm.data.corpora import mukashi
from transformer_lm.errors import UserError
from transformer_lm.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> rows.PreparedCorpus:
    config = data_config(train_split="train[:100]", max_target_length=32)
    return preparation.prepare(config, str(tmp_path_factory.mktemp("workdir"))).train


def batches(corpus, number, **arguments):
    stream = input_pipeline.train_batches(corpus, **{"batch_size": 7, "seed": 1} | arguments)
    return [batch["targets"] for batch in itertools.islice(stream, number)]


def test_started_anywhere_it_goes_on_alike(corpus):
    unbroken = batches(corpus, 300)
    assert corpus.manifest["rows"] < 300 * 7 / 2  # over more than two epochs
    for start in (1, 17, 180, 299):
        np.testing.assert_array_equal(batches(corpus, 300 - start, first_row=7 * start), unbroken[start:])


def test_another_batch_size_goes_on_at_the_same_row(corpus):
    stream = np.concatenate(batches(corpus, 400, batch_size=1))
    np.testing.assert_array_equal(np.concatenate(batches(corpus, 20, batch_size=13, first_row=101)), stream[101:361])


def test_every_epoch_sees_all_rows_once_in_an_order_of_its_own(corpus):
    rows = corpus.manifest["rows"]
    stream = np.concatenate(batches(corpus, 2 * rows, batch_size=1))
    epochs = [[tuple(row) for row in epoch] for epoch in (stream[:rows], stream[rows:])]
    expected = collections.Counter(tuple(row) for row in batch_of_all(corpus)["targets"])
    assert collections.Counter(epochs[0]) == collections.Counter(epochs[1]) == expected
    assert epochs[0] != epochs[1]
    # The order has nothing to do with that on disk, nor with that of the other epoch.
    on_disk = {tuple(row): i for i, row in enumerate(batch_of_all(corpus)["targets"])}
    order = [[on_disk[row] for row in epoch] for epoch in epochs]
    for a, b in ((order[0], range(rows)), (order[1], range(rows)), (order[0], order[1])):
        assert abs(np.corrcoef(a, list(b))[0, 1]) < 5 / np.sqrt(rows)


def test_seeds_differ(corpus):
    assert not np.array_equal(batches(corpus, 5), batches(corpus, 5, seed=2))


def test_the_first_texts(corpus):
    """Pieces of the tales, in the order of the rows; padding is none."""
    spm = Tokenizer.load(corpus.directory.parent.parent / "sentencepiece_model")
    tales = "".join(mukashi.tale(number) for number in range(100))
    known = [text for text in input_pipeline.first_texts(corpus, spm, 20) if " ⁇ " not in text]
    assert len(known) >= 20
    assert all(text and text in tales for text in known)


def test_evaluation_reads_every_row_once_in_order(corpus):
    rows = batch_of_all(corpus)
    read = list(input_pipeline.eval_batches(corpus, batch_size=50, max_rows=-1))
    assert {len(batch["targets"]) for batch in read} == {50}
    for name in ("inputs", "targets", "positions", "segments", "characters", "bytes"):
        joined = np.concatenate([batch[name] for batch in read])
        real = len(rows[name])
        np.testing.assert_array_equal(joined[:real], rows[name])
    assert not np.concatenate([batch["segments"] for batch in read])[real:].any()
    assert len(list(input_pipeline.eval_batches(corpus, batch_size=50, max_rows=100))) == 2


def test_a_corpus_may_have_more_files_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "BLOCK_CHARS", 1)  # a file each document
    many = preparation.prepare(data_config(train_split="train[:300]"), str(tmp_path)).train
    assert len(many.paths) == 300
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (250, limits[1]))
    try:
        read = np.concatenate(batches(many, 2 * many.manifest["rows"], batch_size=1))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert set(map(tuple, read)) == set(map(tuple, batch_of_all(many)["targets"]))


def test_a_file_that_is_lost_is_named(tmp_path):
    lost = preparation.prepare(data_config(train_split="train[:50]"), str(tmp_path)).train
    [path] = lost.paths
    os.unlink(path)
    with pytest.raises(UserError, match=rf"{path} has 0 rows instead of {lost.manifest['rows']}"):
        batches(lost, 1)


def test_rows_of_an_older_manifest(corpus):
    older = rows.PreparedCorpus(corpus.directory, {k: v for k, v in corpus.manifest.items() if k != "rows_of_files"})
    np.testing.assert_array_equal(batches(older, 3), batches(corpus, 3))
