"""Where documents come from: one module a kind of source.

A new kind is a module with a subclass of `Source` and a line in `open_source`.
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

from transformer_lm.data.corpora import files, huggingface, mukashi, mukashi_chat, splits, tfds
from transformer_lm.data.corpora.base import Gone, Options, Source, library_errors
from transformer_lm.errors import UserError

CONVERSATIONS = ("jsonl", "parquet", "huggingface", "mukashi_chat")  # kinds of sources that may hold some
_TFDS_NAME = re.compile(r"\w+(/[\w.\-]+)?(:[\d.*]+)?")


def open_source(name: str, options: Options = Options()) -> Source:
    """The source that a dataset name means; raises UserError if there is none."""
    kind, _, rest = name.partition(":")
    if options.conversations and kind not in CONVERSATIONS:
        raise UserError(f"dataset_name={name!r} has texts; with conversations=True: {', '.join(CONVERSATIONS)}.")
    if kind == "mukashi_chat" and not options.conversations:
        raise UserError(f"dataset_name={name!r} has conversations: set conversations=True.")
    with library_errors(lambda: f"dataset_name={name!r} cannot be opened"):
        if kind in files.READERS and rest:
            return files.Files(kind, rest, options)
        if kind == "huggingface" and rest:
            return huggingface.HuggingFace(rest, options)
        if name == "mukashi":
            return mukashi.Mukashi()
        if name == "mukashi_chat":
            return mukashi_chat.MukashiChat()
        if _TFDS_NAME.fullmatch(name):
            return tfds.Tfds(name, options)
    raise UserError(
        f"dataset_name={name!r} must be a name of TensorFlow Datasets (wiki40b/ja), huggingface:OWNER/NAME[/CONFIG], "
        f"{', '.join(f'{kind}:GLOB' for kind in files.READERS)}, mukashi, or mukashi_chat."
    )


@dataclasses.dataclass(frozen=True)
class Documents:
    """The documents of some splits of a source; may be iterated over again and again."""

    name: str
    split: str
    source: Source
    slices: tuple[splits.Slice, ...]

    def __iter__(self) -> Iterator[str]:
        return self.read()

    def read(self, task: int = 0, num_tasks: int = 1) -> Iterator[str]:
        """The documents of one of many tasks that share the work; see Source.read."""
        with library_errors(lambda: f"Dataset {self.name!r}, split {self.split!r}, cannot be read"):
            for part in self.slices:
                start, stop = splits.resolve(part, self.source.size)
                count = 0
                for document in self.source.read(part.name, start, stop, task, num_tasks):
                    count += 1
                    yield document
                bounded = start > 0 or stop is not None
                if bounded and not count and (num_tasks == 1 or (stop is not None and stop <= start)):
                    raise UserError(
                        f"Split {self.split!r} of dataset {self.name!r}: no document is in {part.name!r} from number "
                        f"{start} on{'' if stop is None else f' and before number {stop}'}"
                        f"{'; in text: they are separated by blank lines' if self.name.startswith('text:') else ''}."
                    )

    def overlaps(self, other: "Documents") -> bool:
        """Whether the same documents are among those of another part of the same content, or of the same files."""
        ours, theirs = (
            [(part, documents.source.content(part.name)) for part in documents.slices] for documents in (self, other)
        )
        for (one, content), (two, others) in itertools.product(ours, theirs):
            if content == others:
                starts, stops = zip(*(splits.resolve(part, self.source.size) for part in (one, two)), strict=True)
                if max(starts) < min((stop for stop in stops if stop is not None), default=math.inf):
                    return True
        return self.name != other.name and self._shares_files_with(other)

    def _shares_files_with(self, other: "Documents") -> bool:
        shared = set(self.source.files).intersection(other.source.files)
        others = collections.defaultdict(list)
        for file, start, stop in other._spans(shared):
            others[file].append((start, stop))
        spans = self._spans(shared)
        return any(max(start, a) < min(stop, b) for file, start, stop in spans for a, b in others[file])

    def _spans(self, files: set[str]) -> Iterator[tuple[str, float, float]]:
        """What is read of some files: (file, number in it of the first document, and of that after the last).

        Documents are counted only where a bound of the split needs it.
        """
        for part in self.slices if files else ():
            start, stop = splits.resolve(part, self.source.size)
            end = math.inf if stop is None else stop
            first = 0  # number of the file's first document
            for shard, file in enumerate(self.source.files):
                whole = first >= start and stop is None
                size = 0 if whole or first >= end else self.source.shard_size(part.name, shard)
                if file in files:
                    yield file, max(start - first, 0), math.inf if whole else min(end - first, size)
                first += size

    def count(self):
        """Counts what its tasks need to find their documents in `read`, and no more."""
        with library_errors(lambda: f"Dataset {self.name!r}, split {self.split!r}, cannot be counted"):
            for part in self.slices:
                self.source.count(part.name, *splits.resolve(part, self.source.size))


def open_documents(name: str, split: str, options: Options = Options(), opened: dict | None = None) -> Documents:
    """Finds a dataset and checks its split, without reading any document yet.

    Args:
      name: a dataset name, see `open_source`.
      split: in the notation of TFDS: "train", "train[:98%]", "train[98%:]".
      options: how records are read.
      opened: sources by name that were opened with these options, to be shared: what one has counted, others know.

    Raises:
      UserError: there is no such dataset or no such split.
    """
    source = (opened or {}).get(name) or open_source(name, options)
    if opened is not None:
        opened[name] = source
    slices = tuple(splits.parse(split))
    for part in slices:
        if part.name not in source.splits:
            raise UserError(f"Dataset {name!r} has no split {part.name!r}; it has {', '.join(source.splits)}.")
    return Documents(name, split, source, slices)


def gone_documents(name: str, split: str, error: UserError) -> Documents:
    """Stands for documents that cannot be opened any more; whoever reads them is told why."""
    return Documents(name, split, Gone(error), (splits.Slice(split),))
