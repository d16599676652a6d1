"""Sub-splits in the notation of TFDS: "train", "train[:98%]", "train[10%:20%]", "train[100:]", "train[:5%]+test"."""

import dataclasses
import re
from collections.abc import Callable

from transformer_lm.errors import UserError

_TERM = re.compile(r"(?P<name>\w[\w.\-]*)(\[(?P<start>-?\d{1,18}%?)?:(?P<stop>-?\d{1,18}%?)?\])?")


@dataclasses.dataclass(frozen=True)
class Slice:
    """Documents [start, stop) of the split `name`; a bound is None, a number, or a text such as "98%"."""

    name: str
    start: str | None = None
    stop: str | None = None


def parse(split: str) -> list[Slice]:
    """The slices that a split's text names; raises UserError on anything else."""
    slices = []
    for term in split.split("+"):
        match = _TERM.fullmatch(term.strip())
        if match is None:
            raise UserError(f"Split {split!r} cannot be read; write it like train, train[:98%] or train[1000:].")
        slices.append(Slice(match["name"], match["start"], match["stop"]))
    return slices


def resolve(part: Slice, size: Callable[[str], int]) -> tuple[int, int | None]:
    """First and one-past-last document of a slice; None for "to the end".

    `size` counts the documents of a split. It is called only where a percentage or a negative bound needs it, since
    for files it costs a pass over them. Percentages are rounded to the nearest document, as TFDS does.
    """

    def bound(text: str | None, default: int | None) -> int | None:
        if text is None:
            return default
        if not text.endswith("%") and not text.startswith("-"):
            return int(text)
        total = size(part.name)
        index = round(float(text[:-1]) * total / 100) if text.endswith("%") else int(text)
        return min(max(index + total if text.startswith("-") else index, 0), total)

    return bound(part.start, 0), bound(part.stop, None)
