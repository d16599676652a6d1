"""`mukashi`: an endless corpus of little Japanese folk tales, told by a grammar.

Every tale is one of the plots below with its slots filled in. A slot is filled once a tale and stays the same
throughout, so that a model must remember who the tale is about. The plots are equally likely, and so are the words of
a slot, all independent of each other: the entropy of the source is known exactly (`bits_per_char`), and a model's bits
per character can be held against it.

Tale i is a pure function of i. Tales with different numbers are different: number i stands for plot i mod P, and a
pseudo-random permutation leads from i div P to one way to fill its slots.

Plots and words lie in mukashi.toml; to add a plot, append one there. `{name}` takes a word from the list `name` of the
plot, or else of WORDS; the words of a list are separated by spaces. A word of several parts, such as 犬/ワンワン, is
used as `{name[0]}` and `{name[1]}`.
"""

import dataclasses
import functools
import hashlib
import math
import string
import tomllib
from collections.abc import Iterator
from pathlib import Path

from transformer_lm.data.corpora.base import Source

SHARD_TALES = 10_000
SPLITS = {"train": range(40_000), "validation": range(10**9, 10**9 + 1_000)}  # numbers of their tales
OPENING = "昔々あるところに"
CLOSING = "{聞いた年}、{語り場}{語り手}から聞いた話です。{結び}"

_TALES = Path(__file__).with_suffix(".toml")
_CONTENT = tomllib.loads(_TALES.read_text(encoding="utf-8"))
WORDS: dict[str, str] = _CONTENT["words"]


@dataclasses.dataclass(frozen=True)
class Plot:
    """A text with slots, and the words of the slots that are its own."""

    text: str
    words: dict[str, str]

    @functools.cached_property
    def slots(self) -> dict[str, list[str] | list[list[str]]]:
        """The words of every slot, in order of appearance."""
        names = dict.fromkeys(name for _, name, _ in self.parts if name is not None)
        lists = {name: (self.words.get(name) or WORDS[name]).split() for name in names}
        return {name: [word.split("/") if "/" in word else word for word in words] for name, words in lists.items()}

    @functools.cached_property
    def line(self) -> str:
        """The text without the line breaks of this file, and what closes every tale."""
        return "".join(map(str.strip, [*self.text.splitlines(), CLOSING]))

    @functools.cached_property
    def parts(self) -> list[tuple[str, str | None, int | None]]:
        """The text as (literal, name of the slot after it, which part of its word)."""
        parts = []
        for literal, field, _, _ in string.Formatter().parse(self.line):
            name, _, index = (field or "").partition("[")
            parts.append((literal, name or None, int(index[:-1]) if index else None))
        return parts

    @functools.cached_property
    def ways(self) -> int:
        """Number of ways to fill the slots."""
        return math.prod(len(words) for words in self.slots.values())

    def choose(self, way: int) -> dict[str, str | list[str]]:
        """The words of a way, 0 <= way < ways: a number in the mixed radix of the slots' sizes."""
        chosen = {}
        for name, words in self.slots.items():
            way, choice = divmod(way, len(words))
            chosen[name] = words[choice]
        return chosen

    def tell(self, chosen: dict[str, str | list[str]]) -> str:
        """The tale with these words."""
        return self.line.format(**chosen)

    def mean_length(self) -> float:
        """Characters of its tales, on average over all ways: the mean of a sum is the sum of the means."""
        return sum(len(literal) + sum(options) / len(options) for literal, options in self._lengths())

    def _lengths(self) -> Iterator[tuple[str, list[int]]]:
        """Each literal with the lengths that the words after it may have."""
        for literal, name, index in self.parts:
            words = [""] if name is None else self.slots[name]
            yield literal, [len(word if index is None else word[index]) for word in words]


PLOTS = [Plot(plot["text"], plot["words"]) for plot in _CONTENT["plots"]]


def tale(number: int) -> str:
    """Tale `number`, 0 <= number < len(PLOTS) * the smallest plot's ways."""
    plot, chosen = plan(number)
    return plot.tell(chosen)


def plan(number: int, plots: list[Plot] = PLOTS) -> tuple[Plot, dict[str, str | list[str]]]:
    """The plot of tale `number`, and the words in its slots."""
    nth, plot_number = divmod(number, len(plots))
    plot = plots[plot_number]
    return plot, plot.choose(_permute(nth, plot.ways, seed=plot_number))


def _permute(index: int, size: int, seed: int) -> int:
    """A pseudo-random permutation of range(size): where `index` goes.

    A Feistel network of four rounds (Luby and Rackoff 1988) permutes the least square number that is not below size;
    whatever it throws out of the range is permuted again until it falls into it.
    """
    side = math.isqrt(size - 1) + 1
    while True:
        left, right = divmod(index, side)
        for turn in range(4):
            digest = hashlib.blake2b(f"{seed} {turn} {right}".encode(), digest_size=16).digest()
            left, right = right, (left + int.from_bytes(digest)) % side
        index = left * side + right
        if index < size:
            return index


def name_of(word: str | list[str]) -> str:
    """A word as it is named: of one with several parts the first."""
    return word if isinstance(word, str) else word[0]


def words_of(slot: str, plots: list[Plot] = PLOTS) -> list[str]:
    """The words that a slot has in any plot, by name."""
    return list(dict.fromkeys(name_of(word) for plot in plots for word in plot.slots.get(slot, ())))


def bits_per_tale() -> float:
    """Entropy of a tale: which plot, and which word in each of its slots."""
    return math.log2(len(PLOTS)) + sum(math.log2(plot.ways) for plot in PLOTS) / len(PLOTS)


def bits_per_char() -> float:
    """Entropy of the source in bits a character: the best that any model can reach on tales it has not seen."""
    return bits_per_tale() / (sum(plot.mean_length() for plot in PLOTS) / len(PLOTS))


class Mukashi(Source):
    """The tales of SPLITS."""

    splits = tuple(SPLITS)

    def num_shards(self, split: str) -> int:
        """See Source."""
        return -(-len(SPLITS[split]) // SHARD_TALES)

    def known_size(self, split: str, shard: int) -> int:
        """See Source."""
        return len(self._shard(split, shard))

    def read_shard(self, split: str, shard: int, start: int = 0) -> Iterator[str]:
        """See Source."""
        return map(tale, self._shard(split, shard)[start:])

    def _shard(self, split: str, shard: int) -> range:
        """The numbers of its tales."""
        return SPLITS[split][shard * SHARD_TALES : (shard + 1) * SHARD_TALES]

    @property
    def fingerprint(self) -> str:
        """A hash of this module and of the words, which is all that a tale depends on."""
        return hashlib.sha256(Path(__file__).read_bytes() + _TALES.read_bytes()).hexdigest()
