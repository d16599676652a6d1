"""Where documents come from: one module a kind of source.

A new kind is a module with a subclass of `Source` and a line in `open_source`.
"""

import dataclasses
from collections.abc import Iterator

from transformer_lm.corpora import files, mukashi, splits
from transformer_lm.corpora.base import Source
from transformer_lm.errors import UserError


def open_source(name: str) -> Source:
    """The source that a dataset name means; raises UserError if there is none."""
    kind, _, rest = name.partition(":")
    if kind in files.READERS and rest:
        return files.Files(kind, rest)
    if name == "mukashi":
        return mukashi.Mukashi()
    raise UserError(
        f"dataset_name={name!r}: TensorFlow Datasets and Hugging Face datasets are not supported yet; "
        "use text:GLOB, jsonl:GLOB or mukashi."
    )


@dataclasses.dataclass(frozen=True)
class Documents:
    """The documents of some splits of a source; may be iterated over again and again."""

    name: str
    split: str
    source: Source
    slices: tuple[splits.Slice, ...]

    def __iter__(self) -> Iterator[str]:
        for part in self.slices:
            yield from self.source.read(part.name, *splits.resolve(part, self.source.size))


def open_documents(name: str, split: str) -> Documents:
    """Finds a dataset and checks its split, without reading any document yet.

    Args:
      name: a dataset name: "mukashi", "text:GLOB", "jsonl:GLOB".
      split: in the notation of TFDS: "train", "train[:98%]", "train[98%:]".

    Raises:
      UserError: there is no such dataset or no such split.
    """
    source = open_source(name)
    slices = tuple(splits.parse(split))
    for part in slices:
        if part.name not in source.splits:
            raise UserError(f"Dataset {name!r} has no split {part.name!r}; it has {', '.join(source.splits)}.")
    return Documents(name, split, source, slices)
