"""Mixtures of corpora: shares are kept, the order is a function of the step."""

import itertools

import numpy as np
import pytest
from real_datasets import write_jsonl
from test_preparation import batch_of_all, data_config

from transformer_lm.data import input_pipeline, preparation
from transformer_lm.data.corpora import mukashi
from transformer_lm.errors import UserError

LETTERS = "abcdefghij"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Three parts of tales to one of letters, of which there is far less than that."""
    folder = tmp_path_factory.mktemp("mixture")
    rng = np.random.default_rng(0)
    write_jsonl(folder / "letters.jsonl", ["".join(rng.choice(list(LETTERS), 200)) for _ in range(30)])
    write_jsonl(folder / "tales.jsonl", [mukashi.tale(number) for number in range(400)])
    names = [(f"jsonl:{folder}/tales.jsonl", 3), (f"jsonl:{folder}/letters.jsonl", 1.0)]
    config = data_config(dataset_name=names, train_split="train[:80%]", eval_split="train[80%:]", vocab_size=1000)
    return preparation.prepare(config, str(folder))


def letter_rows(data, batches) -> np.ndarray:
    """For every row of batches whether it is of letters."""
    letters = [i for i in range(data.tokenizer.vocab_size) if set(data.tokenizer.decode([i])) & set(LETTERS)]
    return np.concatenate([np.isin(batch["targets"], letters).mean(axis=1) > 0.5 for batch in batches])


def test_shares_are_kept_in_any_stretch(mixed):
    batches = list(itertools.islice(input_pipeline.train_batches(mixed.train, batch_size=4, seed=0), 300))
    letters = letter_rows(mixed, batches)
    for start in range(0, len(letters) - 100, 100):
        assert letters[start : start + 100].mean() == pytest.approx(0.25, abs=0.02)


def test_order_is_a_function_of_the_step(mixed):
    whole = list(itertools.islice(input_pipeline.train_batches(mixed.train, batch_size=4, seed=3), 60))
    again = list(
        itertools.islice(input_pipeline.train_batches(mixed.train, batch_size=4, seed=3, first_row=4 * 47), 13)
    )
    for one, other in zip(whole[47:], again, strict=True):
        np.testing.assert_array_equal(one["targets"], other["targets"])


def test_evaluation_sees_the_shares(mixed):
    letters = letter_rows(mixed, input_pipeline.eval_batches(mixed.eval, batch_size=1, max_rows=12))
    assert letters.mean() == pytest.approx(0.25, abs=0.1)


def test_evaluation_of_all_reads_every_row_of_every_part(mixed):
    batches = list(input_pipeline.eval_batches(mixed.eval, batch_size=10, max_rows=-1))
    read = np.concatenate([batch["targets"] for batch in batches])
    expected = np.concatenate([batch_of_all(part)["targets"] for part in mixed.eval.parts])
    assert sorted(map(tuple, read[: len(expected)])) == sorted(map(tuple, expected))
    assert not np.concatenate([batch["segments"] for batch in batches])[len(expected) :].any()


def test_the_tokenizer_learns_from_every_part(mixed):
    for character in LETTERS + "昔々":
        assert mixed.tokenizer.encode(character)[-1] != 0


@pytest.mark.parametrize(
    "weights",
    [(1e308, 1e308), (9e307, 1, 1e308), (float("inf"), 1), (float("nan"), 1), (10**400,), (1e-320, 1e300), (1, -1)],
)
def test_weights_that_cannot_be_shares(weights):
    with pytest.raises(UserError, match=r"must be a name or a list of \(name, weight\)"):
        preparation.open_corpora([("mukashi", weight) for weight in weights], "train", data_config())


@pytest.mark.parametrize("names", [[], [("mukashi", 0)], [("mukashi", -1)], ["mukashi"], [("mukashi",)], 3])
def test_impossible_mixtures(names, tmp_path):
    with pytest.raises(UserError, match=r"must be a name or a list of|must be a text or a list"):
        preparation.prepare(data_config(dataset_name=names), str(tmp_path))
