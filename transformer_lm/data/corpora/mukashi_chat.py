"""`mukashi_chat`: conversations about short tales of the kind of `mukashi`, whose answers the grammar itself can check.

Somebody asks for a tale with some things in it, or tells one; then asks for the same tale with another word, or
questions about it. Plots and wordings lie in mukashi_chat.toml. Conversation i is a pure function of i and
the split.

Of all ways to ask for a thing a fifth, chosen by hashes of their words, are asked in the split `validation` alone:
whoever answers them has learned what an instruction means, not what it looks like. The tales are others, too.
"""

import functools
import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformer_lm.data.corpora import mukashi
from transformer_lm.data.corpora.base import Source
from transformer_lm.data.corpora.mukashi import name_of

SHARD_CONVERSATIONS = 10_000
SPLITS = {"train": range(2 * 10**9, 2 * 10**9 + 20_000), "validation": range(3 * 10**9, 3 * 10**9 + 1_000)}
# How a conversation goes: the assistant tells a tale, perhaps once more with another word; or the user does, and asks
# for answers, or for the tale with another word. What the user says is not scored: where that is the tale, all of the
# loss is about following instructions, and little about what one cannot know.
QUESTIONS = {"told": 2, "retold": 2, "heard": 5, "changed": 3}  # after a tale
COURSES = ("told", "retold", "heard", "heard", "heard", "changed", "changed", "changed")  # equally likely
MAX_WISHES = 3  # things that a tale is asked for with
HELD_OUT = 5  # one of so many ways to ask for a thing is never trained on

_WORDINGS = Path(__file__).with_suffix(".toml")
_CONTENT = tomllib.loads(_WORDINGS.read_text(encoding="utf-8"))
PLOTS = [mukashi.Plot(text, _CONTENT["words"]) for text in _CONTENT["plots"]]
REQUEST, RETELLING, QUESTION = _CONTENT["request"], _CONTENT["retelling"], _CONTENT["question"]
TELLING = _CONTENT["telling"]["begin"]

Words = dict[str, str | list[str]]


class _Chance:
    """Choices that are a pure function of a number."""

    def __init__(self, number: int):
        self._number, self._count = number, 0

    def choose(self, options: Sequence[Any]) -> Any:
        """One of the options, the next time perhaps another."""
        self._count += 1
        digest = hashlib.blake2b(f"{self._number} {self._count}".encode(), digest_size=8).digest()
        return options[int.from_bytes(digest) % len(options)]


def wordings(split: str, kind: dict, **fields: str) -> list[str]:
    """All ways to give an instruction of a kind that belong to a split."""
    ways = _ways(tuple(kind["begin"]), tuple(kind["ask"]))
    held_out = len(ways) // HELD_OUT
    return [way.format(**fields) for way in (ways[:held_out] if split == "validation" else ways[held_out:])]


@functools.cache
def _ways(begins: tuple[str, ...], asks: tuple[str, ...]) -> list[str]:
    """All ways to ask for a thing, whatever it is, in an order by chance."""
    ways = [begin + ask for begin in begins for ask in asks]
    return sorted(ways, key=lambda way: hashlib.blake2b(way.encode()).digest())


def conversation(split: str, number: int) -> list[dict[str, str]]:
    """Conversation `number` of a split, as messages."""
    chance = _Chance(number)
    plot, words = mukashi.plan(number, PLOTS)
    tale = plot.tell(words)

    def ask(kind: dict, **fields: str) -> str:
        """One of the split's wordings."""
        return chance.choose(wordings(split, kind, **fields))

    said = []
    course = chance.choose(COURSES)
    if course in ("told", "retold"):
        slots = [name for name in REQUEST["slots"] if name in words]
        wishes = _some(chance, slots, min(len(slots), chance.choose(range(1, MAX_WISHES + 1))))
        said += [ask(REQUEST, word="と".join(name_of(words[slot]) for slot in wishes)), tale]
    if course in ("retold", "changed"):
        slot = chance.choose([name for name in RETELLING["slots"] if name in words])
        other = chance.choose([word for word in plot.slots[slot] if word != words[slot]])
        request = ask(RETELLING, old=name_of(words[slot]), word=name_of(other))
        words = words | {slot: other}
        said += [request, plot.tell(words)]
    names = {name: name_of(word) for name, word in words.items()}
    kinds = [kind for kind in QUESTION["kinds"] if set(kind["slots"]) & words.keys()]
    for kind in _some(chance, kinds, QUESTIONS[course]):
        slot = next(name for name in kind["slots"] if name in words)
        said += [ask(QUESTION | kind), kind["answer"].format(word=names[slot], **names)]
    if course in ("heard", "changed"):
        said[0] = chance.choose(TELLING) + tale + said[0]
    return [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(said)]


def _some(chance: _Chance, options: list, count: int) -> Iterator:
    """So many different ones of the options."""
    options = list(options)
    for _ in range(count):
        yield options.pop(chance.choose(range(len(options))))


def read_tale(text: str) -> Words | None:
    """The words of a tale by their slots; None for what the grammar does not tell."""
    for plot, groups, pattern in _patterns():
        match = pattern.fullmatch(text)
        if match is None:
            continue
        words = {}
        for slot, options in plot.slots.items():
            heard = {index: match[group] for (name, index), group in groups.items() if name == slot}
            words[slot] = next((word for word in options if _has_parts(word, heard)), None)
        if None not in words.values() and plot.tell(words) == text:
            return words
    return None


def _has_parts(word: str | list[str], parts: dict[int | None, str]) -> bool:
    return all((word if index is None else word[index]) == part for index, part in parts.items())


@functools.cache
def _patterns() -> list[tuple[mukashi.Plot, dict[tuple[str, int | None], str], re.Pattern[str]]]:
    """Of each plot what its tales look like, and the groups in that by slot and part of its word."""
    return [(plot, *_pattern(plot)) for plot in PLOTS]


def _pattern(plot: mukashi.Plot) -> tuple[dict[tuple[str, int | None], str], re.Pattern[str]]:
    groups: dict[tuple[str, int | None], str] = {}
    pattern = ""
    for literal, name, index in plot.parts:
        pattern += re.escape(literal)
        if name is None:
            continue
        if (name, index) in groups:
            pattern += f"(?P={groups[name, index]})"  # the same word again
            continue
        groups[name, index] = group = f"s{len(groups)}"
        options = (re.escape(word if index is None else word[index]) for word in plot.slots[name])
        pattern += f"(?P<{group}>{'|'.join(options)})"
    return groups, re.compile(pattern)


class MukashiChat(Source):
    """The conversations of SPLITS."""

    splits = tuple(SPLITS)
    judges = True

    def num_shards(self, split: str) -> int:
        """See Source."""
        return -(-len(SPLITS[split]) // SHARD_CONVERSATIONS)

    def known_size(self, split: str, shard: int) -> int:
        """See Source."""
        return len(self._shard(split, shard))

    def read_shard(self, split: str, shard: int, start: int = 0) -> Iterator[str]:
        """See Source."""
        for number in self._shard(split, shard)[start:]:
            yield json.dumps(conversation(split, number), ensure_ascii=False)

    def _shard(self, split: str, shard: int) -> range:
        """The numbers of its conversations."""
        return SPLITS[split][shard * SHARD_CONVERSATIONS : (shard + 1) * SHARD_CONVERSATIONS]

    def judge(self, messages: list[dict[str, str]], answer: str) -> bool:
        """Whether an answer does what was asked for.

        A request may be answered by any tale of the grammar that has what was asked for in its slots; all else has one
        right answer.
        """
        asked, right = messages[-2]["content"], messages[-1]["content"]
        if len(messages) > 2 or mukashi.OPENING in asked or not right.startswith(mukashi.OPENING):
            return answer == right
        tale = read_tale(answer) or {}
        return _wishes(asked) <= {name_of(tale[slot]) for slot in REQUEST["slots"] if slot in tale}

    @property
    def fingerprint(self) -> str:
        """A hash of this module and of the words, which is all that a conversation depends on."""
        own = Path(__file__).read_bytes() + _WORDINGS.read_bytes()
        return hashlib.sha256(own + mukashi.Mukashi().fingerprint.encode()).hexdigest()


def _wishes(request: str) -> set[str]:
    """The words that a request names: at each place the longest."""
    words = {word for slot in REQUEST["slots"] for word in mukashi.words_of(slot, PLOTS)}
    return set(re.findall("|".join(map(re.escape, sorted(words, key=len, reverse=True))), request))
