"""Requests for texts, worked on side by side: who waits, who has a slot, what text each has so far.

A request goes through `submit`; each `advance` fills free slots in the order of arrival, reads a chunk of the prompts
that are new, writes one token of every text whose prompt has been read, and tells what is new. Nothing here waits or
runs in a thread: whoever calls `advance` does the work.
"""

import collections
import dataclasses
from collections.abc import Iterator

import numpy as np

from transformer_lm.fields import CountOrZero, check_value
from transformer_lm.generation.choosing import Settings
from transformer_lm.generation.engine import CHUNK, Choice, Engine
from transformer_lm.generation.streaming import TextStream
from transformer_lm.tokenizer import EOS_ID, Tokenizer


@dataclasses.dataclass(frozen=True)
class Request:
    """A text to be written."""

    prompt: list[int]  # token ids
    settings: Settings = dataclasses.field(default_factory=Settings)
    max_tokens: int = 16  # new ones
    stop: tuple[str, ...] = ()  # the text ends before the first of them
    end_ids: tuple[int, ...] = ()  # tokens that end the text as EOS does
    number: int = 0  # texts of one prompt, with one seed, differ by it
    has_start: bool = False  # whether the prompt begins with START_ID, which is else put in front
    echo: bool = False  # whether the text begins with the prompt
    log_probs: bool = False  # whether tokens of the prompt are scored, where it is echoed
    ignore_eos: bool = False  # whether a text goes on behind an EOS, as benchmarks want it

    def __post_init__(self):
        for name in ("max_tokens", "number"):
            check_value(name, getattr(self, name), CountOrZero)


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of a text.

    Attributes:
      id: which.
      offset: where its text begins, in characters.
      log_prob: how likely it was, by the network's own logits; None for a text's START_ID.
      alternatives: the likeliest tokens there and their log probabilities, likeliest first.
    """

    id: int
    offset: int
    log_prob: float | None
    alternatives: list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Part:
    """What is new of a text.

    Attributes:
      text: more of it, perhaps "".
      tokens: those that begin in what is known by now.
      written: how many tokens the network has written so far, EOS included.
      finish_reason: "" while it goes on, "stop" at its end or at a stop string, "length" for want of room.
    """

    text: str
    tokens: list[Token]
    written: int = 0
    finish_reason: str = ""


class Job:
    """A request that is being worked on.

    Attributes:
      request: what was asked for.
      written: number of tokens so far, EOS included.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer):
        self.request, self.written = request, 0
        self._stream = TextStream(tokenizer, request.prompt, request.stop)
        self._shown = 0  # characters
        self._tokens: list[Token] = []  # whose text is not shown yet

    def echo(self, tokenizer: Tokenizer, scores: Choice | None) -> Part:
        """The prompt as the text's first part."""
        stream, tokens = TextStream(tokenizer), []
        text = ""
        for place, token in enumerate(self.request.prompt):
            told = (None, []) if scores is None else _told(scores, place, self.request.settings.alternatives)
            tokens.append(Token(token, stream.decoded, *told))
            text += stream.push(token)
        self._shown = len(text := text + stream.finish())
        self._stream.decoded += len(text)
        return Part(text, tokens)

    def add(self, choice: Choice, slot: int) -> Part:
        """What the token that was chosen in a slot makes new."""
        token = int(choice.tokens[slot])
        self.written += 1
        told = _told(choice, slot, self.request.settings.alternatives)
        self._tokens.append(Token(token, self._stream.decoded, *told))
        if token in (EOS_ID, *self.request.end_ids) and not self.request.ignore_eos:
            return self._part(self._stream.finish(), "stop")
        text = self._stream.push(token)
        if self._stream.stopped:
            return self._part(text, "stop")
        if self.written >= self.request.max_tokens:
            text += self._stream.finish()
            return self._part(text, "stop" if self._stream.stopped else "length")
        return self._part(text, "")

    def _part(self, text: str, finish_reason: str) -> Part:
        self._shown += len(text)
        whole = finish_reason and not self._stream.stopped
        count = sum(whole or token.offset < self._shown for token in self._tokens)
        tokens, self._tokens = self._tokens[:count], self._tokens[count:]
        return Part(text, tokens, self.written, finish_reason)


def _told(choice: Choice, place: int, count: int) -> tuple[float | None, list[tuple[int, float]]]:
    """Log probability and alternatives at a place, as plain numbers."""
    log_prob = float(choice.log_probs[place])
    if np.isnan(log_prob):
        return None, []
    best = zip(choice.alternatives[place, :count], choice.alternative_log_probs[place, :count], strict=True)
    return log_prob, [(int(token), float(value)) for token, value in best if np.isfinite(value)]


class Scheduler:
    """Who waits, and who has a slot."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer):
        self.engine, self.tokenizer = engine, tokenizer
        self._waiting: collections.deque[Job] = collections.deque()
        self._running: dict[int, Job] = {}  # by slot
        self._free: list[int] = list(range(engine.slots))  # slots, that which is free for longest first
        self._unread: collections.deque[int] = collections.deque()  # slots whose prompts are to be read, in turns

    @property
    def running(self) -> int:
        """How many texts have a slot."""
        return len(self._running)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._running)

    def submit(self, request: Request) -> Job:
        """Takes a request; raises UserError for one that the engine cannot work on."""
        self.engine.check(request.prompt, request.max_tokens, request.settings)
        job = Job(request, self.tokenizer)
        self._waiting.append(job)
        return job

    def cancel(self, job: Job):
        """Forgets a request, wherever it is; its slot is free at once."""
        if job in self._waiting:
            self._waiting.remove(job)
        for slot in [slot for slot, other in self._running.items() if other is job]:
            self._release(slot)

    def clear(self):
        """Forgets all requests."""
        for queue in (self._waiting, self._running, self._unread):
            queue.clear()
        self._free = list(range(self.engine.slots))
        self.engine.reset()

    def advance(self) -> list[tuple[Job, Part]]:
        """Fills free slots, reads a chunk of prompts, writes one token of every text, and says what is new."""
        self._fill_slots()
        parts = list(self._read_prompts())
        written = {slot: job for slot, job in self._running.items() if slot not in self._unread}
        if not written:
            return parts
        choice = self.engine.step()
        for slot, job in written.items():
            part = job.add(choice, slot)
            if part.finish_reason:
                self._release(slot)
            parts.append((job, part))
        return parts

    def _fill_slots(self):
        """Gives free slots to those who have waited longest."""
        while self._waiting and self._free:
            job = self._waiting.popleft()
            request = job.request
            start, scored = request.has_start, request.echo and request.log_probs
            slot = self.engine.best_slot(self._free, request.prompt, has_start=start)
            self.engine.begin(slot, request.prompt, request.settings, request.number, has_start=start, scored=scored)
            self._free.remove(slot)
            self._running[slot] = job
            self._unread.append(slot)

    def _read_prompts(self) -> Iterator[tuple[Job, Part]]:
        """Reads at most CHUNK tokens of prompts, so that those whose texts are being written need not wait for long."""
        left = CHUNK
        while self._unread and left > 0:
            slot = self._unread.popleft()
            left -= self.engine.read(slot)
            if self.engine.is_read(slot):
                yield from self._begin(slot)
            else:
                self._unread.append(slot)  # a long prompt does not hold up short ones

    def _begin(self, slot: int) -> Iterator[tuple[Job, Part]]:
        """What is told of a text before its first token."""
        job = self._running[slot]
        if job.request.echo:
            yield job, job.echo(self.tokenizer, self.engine.scores(slot) if job.request.log_probs else None)
        if not job.request.max_tokens:
            self._release(slot)
            yield job, Part("", [], 0, "length")

    def _release(self, slot: int):
        del self._running[slot]
        self._free.append(slot)
        if slot in self._unread:
            self._unread.remove(slot)
        self.engine.release(slot)
