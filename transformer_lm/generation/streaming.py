"""Token ids in, one after the other; text out: no part is ever taken back, and no character comes in halves."""

import unicodedata
from collections.abc import Iterable

from transformer_lm.tokenizer import Tokenizer

LONGEST_WAIT = 64  # characters of a cluster that are held back: some texts heap marks on a letter without end
ZWJ = "\u200d"


class Detokenizer:
    """The text that follows a prompt, as its tokens come.

    What SentencePiece makes of a token depends on what stands before it in two ways alone: at the beginning of a text a
    space is dropped, and byte pieces wait for each other. So a token is decoded behind the last whole piece before it
    and the bytes that still wait, not behind the whole text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Iterable[int] = ()):
        """Begins behind a prompt, whose own last bytes wait, too, should they be no whole character."""
        self._tokenizer = tokenizer
        prompt = list(prompt)
        start = next((i for i in reversed(range(len(prompt))) if tokenizer.has_text(prompt[i])), None)
        # One whole piece with text, if there is any text in front.
        self._before: list[int] = [] if start is None else [prompt[start]]
        # Tokens since then that may still change the text.
        self._waiting: list[int] = prompt if start is None else prompt[start + 1 :]
        certain = self._waiting[: len(self._waiting) - self._unfinished_bytes()]
        self._settle(certain, "" if self._before else self._decode(certain))

    def push(self, token: int) -> str:
        """The text that this token makes certain."""
        self._waiting.append(token)
        certain = self._waiting[: len(self._waiting) - self._unfinished_bytes()]
        text = self._decode(certain)
        if self._tokenizer.has_text(token):
            self._before, self._waiting = [token], []
        else:
            self._settle(certain, text)
        return text

    def _settle(self, certain: list[int], text: str):
        """Lets go of waiting tokens whose text is certain."""
        if text and not self._before:
            self._before = self._any_anchor()
        said_nothing = [] if self._before else list(dict.fromkeys(certain))  # control pieces: once is enough
        self._waiting = said_nothing + self._waiting[len(certain) :]

    def finish(self) -> str:
        """The text of what still waits: U+FFFD for each byte of a character that did not come."""
        return self._decode(self._waiting)

    def _any_anchor(self) -> list[int]:
        """A whole piece with text, whichever: that something stands in front is all that matters."""
        return [next(token for token in range(self._tokenizer.vocab_size) if self._tokenizer.has_text(token))]

    def _decode(self, tokens: list[int]) -> str:
        before = len(self._tokenizer.decode(self._before))
        return self._tokenizer.decode(self._before + tokens)[before:]

    def _unfinished_bytes(self) -> int:
        """How many of the last tokens are bytes that begin a character, and do not end it."""
        for count, token in enumerate(reversed(self._waiting[-3:]), 1):
            byte = self._tokenizer.byte_of(token)
            if byte is None:
                return 0
            if byte >> 6 != 0b10:  # the first of a character's bytes, or the only one
                size = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
                return count if count < size else 0
        return 0


class TextStream:
    """The text of a continuation as it may be shown: whole characters, and nothing of a stop string.

    Attributes:
      decoded: how many characters the tokens have given so far, shown or not.
      stopped: whether a stop string has come; the text ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Iterable[int] = (), stop: Iterable[str] = ()):
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._stop = [text for text in stop if text]
        self._held = ""
        self.decoded, self.stopped = 0, False

    def push(self, token: int) -> str:
        """What may be shown now that this token has come."""
        return self._add(self._detokenizer.push(token), last=False)

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        return self._add(self._detokenizer.finish(), last=True)

    def _add(self, text: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        self.decoded += len(text)
        self._held += text
        ends = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            self._held = self._held[: min(ends)]
        free = len(self._held)
        if not (self.stopped or last):
            free = min(begun_stop(self._held, self._stop), last_cluster(self._held))
        shown, self._held = self._held[:free], self._held[free:]
        return shown


def begun_stop(text: str, stop: list[str]) -> int:
    """Where the text's end begins that may be the beginning of a stop string; its length if none does."""
    for start in range(max(0, len(text) - max(map(len, stop), default=0) + 1), len(text)):
        if any(one.startswith(text[start:]) for one in stop):
            return start
    return len(text)


def last_cluster(text: str) -> int:
    """Where the text's last character begins as people see it: a letter with its marks, an emoji sequence."""
    place = len(text) - 1
    while place > max(0, len(text) - LONGEST_WAIT) and joins(text, place):
        place -= 1
    return max(place, 0)


def joins(text: str, place: int) -> bool:
    """Whether text[place] belongs to the character before it (as in Unicode's annex 29, and rather more often)."""
    before, here = text[place - 1], text[place]
    if before == ZWJ or (before, here) == ("\r", "\n"):
        return True
    if _is_flag_letter(here):
        letters = 0
        while letters < place and _is_flag_letter(text[place - 1 - letters]):
            letters += 1
        return letters % 2 == 1
    return (
        unicodedata.category(here) in ("Mn", "Mc", "Me")
        or here in (ZWJ, "\u200c", "\uff9e", "\uff9f")  # the last two are half-width marks of voiced kana
        or "\U0001f3fb" <= here <= "\U0001f3ff"  # tones of skin
        or "\U000e0020" <= here <= "\U000e007f"  # tags
        or "\u1160" <= here <= "\u11ff"  # later letters of a Korean syllable
    )


def _is_flag_letter(character: str) -> bool:
    return "\U0001f1e6" <= character <= "\U0001f1ff"
