"""What every kind of source offers."""

import abc
import contextlib
import dataclasses
import textwrap
from collections.abc import Callable, Iterator, Sequence

from transformer_lm.errors import UserError, is_out_of_memory

CAUSE_CHARS = 400
MAX_DOCUMENT_BYTES = 1 << 27  # preparing one takes 23 times its bytes of memory; beyond is a file without line ends


@dataclasses.dataclass(frozen=True)
class Options:
    """How sources are read, whatever their kind.

    Attributes:
      text_field: which field of a record holds the document (JSON lines, Parquet, TFDS, Hugging Face).
      streaming: whether Hugging Face datasets are read from the hub as they are needed, without a copy on disk.
      conversations: whether documents are conversations, see conversations.py.
    """

    text_field: str = "text"
    streaming: bool = False
    conversations: bool = False


@contextlib.contextmanager
def library_errors(what: Callable[[], str]) -> Iterator[None]:
    """Makes whatever a library raises a UserError of one line: what is wrong, and the cause in the library's words.

    The libraries that read documents raise nearly anything on odd input, so that none is named here. What says
    something of this machine rather than of the input passes: no memory, Ctrl-C.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        cause = error
        while cause.__cause__ is not None and not isinstance(cause, OSError) and "/" not in str(cause):  # names a file
            cause = cause.__cause__
        words = textwrap.shorten(f"{type(cause).__name__}: {cause}", CAUSE_CHARS, placeholder=" ...")
        raise UserError(f"{what()}: {words}") from error


def check_document_size(size: int, where: str):
    """Raises UserError where a document has too many bytes, or characters, to be prepared."""
    if size > MAX_DOCUMENT_BYTES:
        most = f"{MAX_DOCUMENT_BYTES >> 20} MB"
        raise UserError(f"{where} holds a document of more than {most}; cut it, in text: by blank lines.")


class Source(abc.ABC):
    """Documents in a fixed order, in named splits; each split lies in shards that can be read by themselves."""

    splits: tuple[str, ...]
    judges = False  # whether `judge` can tell a good answer
    files: Sequence[str] = ()  # of a source of files that of each shard, by the one name that it has in all sources

    def __init__(self):
        self._sizes: dict[tuple[str, int], int] = {}

    @abc.abstractmethod
    def num_shards(self, split: str) -> int:
        """Number of shards of a split."""

    @abc.abstractmethod
    def read_shard(self, split: str, shard: int, start: int = 0) -> Iterator[str]:
        """The documents of a shard, in order, from number `start` on. May raise anything; see `documents`."""

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A text that changes when the content does."""

    def content(self, split: str) -> tuple:
        """What a split is told by, under whatever name its source was opened."""
        return self.fingerprint, split

    def judge(self, messages: list[dict[str, str]], answer: str) -> bool:
        """Whether an answer does as well as the last one of a conversation; of sources that judge alone."""
        raise NotImplementedError

    def shard_name(self, split: str, shard: int) -> str:
        """What a person knows a shard by."""
        return f"Split {split!r}, shard {shard}"

    def documents(self, split: str, shard: int, start: int = 0) -> Iterator[str]:
        """As `read_shard`; raises a UserError that names shard and document where one cannot be read."""
        number = start

        def what():
            return f"{self.shard_name(split, shard)} cannot be read to its end; document {number + 1} of it"

        with library_errors(what):
            for document in self.read_shard(split, shard, start):
                check_document_size(len(document), self.shard_name(split, shard))
                yield document
                number += 1

    def known_size(self, split: str, shard: int) -> int | None:
        """Number of documents in a shard, None where that is not known without reading it."""
        return self._sizes.get((split, shard))

    def shard_size(self, split: str, shard: int) -> int:
        """Number of documents in a shard; where it is not known they are counted, once."""
        size = self.known_size(split, shard)
        if size is None:
            size = self._sizes[split, shard] = self.count_shard(split, shard)
        return size

    def count_shard(self, split: str, shard: int) -> int:
        """Counts the documents of a shard, by reading it where nothing else tells."""
        return sum(1 for _ in self.documents(split, shard))

    def size(self, split: str) -> int:
        """Number of documents in a split."""
        return sum(self.shard_size(split, shard) for shard in range(self.num_shards(split)))

    def count(self, split: str, start: int, stop: int | None):
        """Counts the shards that must be counted for the tasks of `read` to know where their documents are."""
        first = 0
        for shard in range(self.num_shards(split)):
            if first >= (start if stop is None else stop):
                return
            first += self.shard_size(split, shard)

    def read(self, split: str, start: int, stop: int | None, task: int, num_tasks: int) -> Iterator[str]:
        """The documents numbered start <= n < stop of a split, to its end where stop is None.

        Of many tasks that share the work, each reads the shards whose number modulo `num_tasks` is its own.
        """
        first = 0  # number of the shard's first document
        for shard in range(self.num_shards(split)):
            if stop is not None and first >= stop:
                return
            mine = shard % num_tasks == task
            size = self.known_size(split, shard)
            counts = stop is not None or first < start  # how many documents it has, for where those after it stand
            if (not mine and (size is not None or not counts)) or (size is not None and first + size <= start):
                first += size or 0
                continue
            skip = max(0, start - first) if size is not None else 0  # what is not counted yet is read from its start
            number = first + skip
            for document in self.documents(split, shard, skip):
                if stop is not None and number >= stop:
                    return
                if mine and number >= start:
                    yield document
                number += 1
            first = number


class Gone(Source):
    """Stands for a source that cannot be opened any more, where what was made of it is still there.

    Attributes:
      error: why it cannot be.
    """

    splits = ()
    fingerprint = ""  # nobody's

    def __init__(self, error: UserError):
        super().__init__()
        self.error = error

    def num_shards(self, split: str) -> int:
        """Raises why."""
        raise self.error

    def read_shard(self, split: str, shard: int, start: int = 0) -> Iterator[str]:
        """Raises why."""
        raise self.error
