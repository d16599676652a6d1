"""What every kind of source offers."""

import abc
from collections.abc import Iterator


class Source(abc.ABC):
    """Documents in a fixed order, in one or more named splits."""

    splits: tuple[str, ...]

    @abc.abstractmethod
    def read(self, split: str, start: int, stop: int | None) -> Iterator[str]:
        """The documents numbered start <= n < stop of a split; to its end where stop is None."""

    @abc.abstractmethod
    def size(self, split: str) -> int:
        """Number of documents in a split."""

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A text that changes when the content does."""
