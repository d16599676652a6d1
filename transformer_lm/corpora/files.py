"""Documents in local files: `text:GLOB` and `jsonl:GLOB`, each also gzipped (.gz)."""

import functools
import glob
import gzip
import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterator
from typing import TextIO

from transformer_lm.corpora.base import Source
from transformer_lm.errors import UserError


def read_text(lines: TextIO, path: str) -> Iterator[str]:
    """Documents are separated by blank lines; a file without one is a single document."""
    del path
    for blank, group in itertools.groupby(lines, key=lambda line: not line.strip()):
        if not blank:
            yield "".join(group).rstrip("\n")


def read_jsonl(lines: TextIO, path: str) -> Iterator[str]:
    """One JSON object a line, the document in its field `text`."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{path}, line {number}: not a JSON object with a field "text" ({error!r}).') from error
        if not isinstance(text, str):
            raise UserError(f'{path}, line {number}: field "text" is a {type(text).__name__}, not a string.')
        yield text


READERS: dict[str, Callable[[TextIO, str], Iterator[str]]] = {"text": read_text, "jsonl": read_jsonl}


class Files(Source):
    """All files that a glob names, in the order of their names. Their one split is `train`."""

    splits = ("train",)

    def __init__(self, kind: str, pattern: str):
        """`kind` is a key of READERS; `pattern` a path or glob, ** included."""
        self._reader = READERS[kind]
        self._paths = sorted(filter(os.path.isfile, glob.glob(os.path.expanduser(pattern), recursive=True)))
        if not self._paths:
            raise UserError(f"No file matches {pattern!r} (dataset {kind}:{pattern}).")

    def read(self, split: str, start: int, stop: int | None) -> Iterator[str]:
        """See Source.read."""
        del split
        return itertools.islice(self._documents(), start, stop)

    @functools.cache  # noqa: B019  (a run holds one or two sources, to its end)
    def size(self, split: str) -> int:
        """Counts by reading every file once."""
        del split
        return sum(1 for _ in self._documents())

    @property
    def fingerprint(self) -> str:
        """A hash of the files' names, sizes and times of change."""
        stats = [(os.path.abspath(path), os.stat(path)) for path in self._paths]
        facts = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _documents(self) -> Iterator[str]:
        for path in self._paths:
            opener = gzip.open if path.endswith(".gz") else open
            try:
                with opener(path, "rt", encoding="utf-8", newline="\n") as lines:
                    yield from self._reader(lines, path)
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8: {error.reason}; convert it, for example with iconv.") from error
            except (EOFError, zlib.error, OSError) as error:
                raise UserError(f"{path} cannot be read to its end: {error}") from error
