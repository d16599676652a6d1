"""The tales: what is promised of them, held against a parser of their grammar that is written here."""

import collections
import math
import re
import subprocess
import sys

import pytest

from transformer_lm.data import corpora
from transformer_lm.data.corpora import mukashi

PER_PLOT = 500  # tales that are parsed


def parse(tale: str) -> list[tuple[int, dict[str, str]]]:
    """Every way in which the grammar can tell this tale: (number of the plot, word of each slot)."""
    return [
        (number, filling)
        for number, plot in enumerate(mukashi.PLOTS)
        for filling in fillings(re.split(r"\{(.*?)\}", plot.line), tale, {}, plot.words)
    ]


def fillings(parts: list[str], tale: str, filling: dict[str, str], words: dict[str, str]):
    """`parts` are literals and fields in turn, as re.split leaves them."""
    literal, *rest = parts
    if not tale.startswith(literal):
        return
    tale = tale.removeprefix(literal)
    if not rest:
        if not tale:
            yield filling
        return
    name, _, index = rest[0].partition("[")
    for word in [filling[name]] if name in filling else (words.get(name) or mukashi.WORDS[name]).split():
        spelled = word.split("/")[int(index[:-1])] if index else word
        if tale.startswith(spelled):
            yield from fillings(rest[1:], tale.removeprefix(spelled), {**filling, name: word}, words)


@pytest.fixture(scope="module")
def parsed():
    return [parse(mukashi.tale(number)) for number in range(PER_PLOT * len(mukashi.PLOTS))]


def test_form():
    assert len(mukashi.PLOTS) >= 12
    for plot in mukashi.PLOTS:
        lengths = list(plot._lengths())
        shortest, longest = (sum(len(literal) + pick(words) for literal, words in lengths) for pick in (min, max))
        assert 120 <= shortest <= longest <= 400
        for way in range(0, plot.ways, plot.ways // 50):
            tale = plot.tell(plot.choose(way))
            assert tale.startswith("昔々あるところに")
            assert shortest <= len(tale) <= longest
            assert not set("{}[]/ \n") & set(tale)


def test_every_tale_is_told_in_one_way_only(parsed):
    """So that different choices are different tales, and the entropy of the choices is that of the texts."""
    assert all(len(ways) == 1 for ways in parsed)
    assert sum(plot.ways for plot in mukashi.PLOTS) > 10**9


def test_choices_are_uniform_and_independent(parsed):
    """Every word of every slot is as frequent as it ought to be, and so is every pair of neighbouring slots."""
    counts = collections.defaultdict(collections.Counter)
    for [(plot, filling)] in parsed:
        slots = list(filling.items())
        for (name, word), (next_name, next_word) in zip(slots, slots[1:] + slots[:1], strict=True):
            counts[plot, name][word] += 1
            counts[plot, name, next_name][word, next_word] += 1
    sizes = {key: math.prod(len(mukashi.PLOTS[key[0]].slots[name]) for name in key[1:]) for key in counts}
    for key, counter in counts.items():
        expected = PER_PLOT / sizes[key]
        chi_squared = sum((n - expected) ** 2 for n in counter.values()) / expected
        chi_squared += (sizes[key] - len(counter)) * expected  # those that never came
        freedom = sizes[key] - 1
        assert chi_squared < freedom + 5 * math.sqrt(2 * freedom) + 10, key


def test_entropy(parsed):
    """Against surprisals: the mean of -log2 p over tales, p from their parse; exact up to the mean over plots."""

    def bits(plot, filling):
        sizes = [len((mukashi.PLOTS[plot].words.get(name) or mukashi.WORDS[name]).split()) for name in filling]
        return math.log2(len(mukashi.PLOTS)) + sum(map(math.log2, sizes))

    surprisals = [bits(*way) for [way] in parsed]
    assert sum(surprisals) / len(parsed) == pytest.approx(mukashi.bits_per_tale(), rel=1e-9)
    characters = sum(len(mukashi.tale(number)) for number in range(len(parsed)))
    assert sum(surprisals) / characters == pytest.approx(mukashi.bits_per_char(), rel=2e-3)


def test_train_and_validation_are_disjoint():
    train = list(corpora.open_documents("mukashi", "train"))
    validation = list(corpora.open_documents("mukashi", "validation"))
    assert (len(train), len(validation)) == (40_000, 1_000)
    assert len({*train, *validation}) == len(train) + len(validation)
    assert list(corpora.open_documents("mukashi", "train[10:12]")) == [mukashi.tale(10), mukashi.tale(11)]


def test_same_in_another_process():
    code = "from transformer_lm.data.corpora import mukashi; print(mukashi.tale(123456789))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.strip() == mukashi.tale(123456789)


def test_permutation_is_one():
    for size in (1, 2, 7, 100, 1000):
        assert sorted(mukashi._permute(i, size, seed=3) for i in range(size)) == list(range(size))
