"""Documents in files, local or remote: `text:GLOB`, `jsonl:GLOB`, `parquet:GLOB`, `aozora:GLOB`.

Each may be compressed (.gz, .xz, .bz2, .zst), and may lie wherever fsspec reaches: a path, gs://, s3://, https://.
"""

import functools
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator

import fsspec
from fsspec.implementations.local import LocalFileSystem

from transformer_lm.data.corpora import aozora, base, conversations
from transformer_lm.data.corpora.base import Options, Source, check_document_size, library_errors
from transformer_lm.data.corpora.content import BUFFER_BYTES, check_encoding, check_text, decompressed
from transformer_lm.data.corpora.listing import list_files
from transformer_lm.errors import UserError
from transformer_lm.extras import optional_import

PARQUET_ROWS = 256
MAX_ARRAY_BYTES = 1 << 30  # of a file that is one JSON array


def read_text(file: io.BufferedReader, path: str, options: Options) -> Iterator[str]:
    """Documents are separated by blank lines; a file without one is a single document."""
    del options
    check_text(file.peek(), path)
    lines: list[str] = []
    size = 0
    for number, line in _lines(file, path):
        if line.strip():
            lines.append(_decode(line, path, number))
            size += len(line)
            check_document_size(size, path)
        elif lines:
            yield "".join(lines).rstrip("\r\n")
            lines, size = [], 0
    if lines:
        yield "".join(lines).rstrip("\r\n")


def read_jsonl(file: io.BufferedReader, path: str, options: Options) -> Iterator[str]:
    """One JSON object a line, or all in one JSON array; the document is in the field `options.text_field`.

    Of a key that stands twice in an object the last one counts, and null is an empty document.
    """
    check_text(file.peek(), path)
    if re.match(rb"(\xef\xbb\xbf)?\s*\[\s*\{", file.peek()):
        with library_errors(lambda: f"{path} is not a JSON array"):
            content = file.read(MAX_ARRAY_BYTES + 1)
            if len(content) > MAX_ARRAY_BYTES:
                raise UserError(f"{path} is a JSON array of more than {MAX_ARRAY_BYTES >> 20} MB; make it JSON lines.")
            records = enumerate(json.loads(content.decode("utf-8-sig")), 1)
        yield from (_document(record, options, f"{path}, record {number}") for number, record in records)
        return
    for number, line in _lines(file, path):
        if not line.strip():
            continue
        where, line = f"{path}, line {number}", _decode(line, path, number)
        with library_errors(lambda where=where: f"{where}: not a JSON object; mend the line"):
            record = json.loads(line)
        yield _document(record, options, where)


def _document(record, options: Options, where: str) -> str:
    """The text in a record's field, or the conversation that it is."""
    name = options.text_field
    if options.conversations:
        return conversations.document(record, name, where)
    if not isinstance(record, dict) or name not in record:
        raise UserError(f"{where}: not a JSON object with a field {name!r}; mend it, or set text_field.")
    return check_text_value(record[name], where, name)


def _lines(file: io.BufferedReader, path: str) -> Iterator[tuple[int, bytes]]:
    """The lines with their numbers, from 1."""
    for number, line in enumerate(iter(functools.partial(file.readline, base.MAX_DOCUMENT_BYTES + 1), b""), 1):
        check_document_size(len(line), path)
        yield number, line


def read_parquet(file: io.BufferedReader, path: str, options: Options) -> Iterator[str]:
    """One document a row, in the column `options.text_field`, or in those of a conversation."""
    field = options.text_field
    if not options.conversations:
        return check_texts(parquet_column(file, path, field), path, field)
    batches = _parquet_batches(file, path, lambda names: conversations.columns(names, field))
    rows = (row for batch in batches for row in batch.to_pylist())
    return (conversations.document(row, field, f"{path}, row {number}") for number, row in enumerate(rows, 1))


def parquet_column(file: io.BufferedReader, path: str, name: str) -> Iterator:
    """The values of a column of a Parquet file, a few hundred rows in memory at a time."""

    def choose(names: list[str]) -> list[str]:
        check_field(name, names, f"{path} has no column")
        return [name]

    for batch in _parquet_batches(file, path, choose):
        yield from batch.column(0).to_pylist()


def open_parquet(file: io.BufferedReader, path: str):
    """pyarrow's reader of a Parquet file; raises UserError where it is none."""
    parquet = optional_import("pyarrow.parquet", "hf", "Reading Parquet")
    with library_errors(lambda: f"{path} cannot be read as Parquet"):
        return parquet.ParquetFile(file)


def _parquet_batches(file: io.BufferedReader, path: str, choose: Callable[[list[str]], list[str]]) -> Iterator:
    """Some hundred rows each, with those of the columns' names that `choose` takes."""
    table = open_parquet(file, path)
    with library_errors(lambda: f"{path} cannot be read as Parquet"):
        yield from table.iter_batches(batch_size=PARQUET_ROWS, columns=choose(table.schema_arrow.names))


def read_aozora(file: io.BufferedReader, path: str, options: Options) -> Iterator[str]:
    """A work of Aozora Bunko as it is published there (Shift_JIS, its notation, .txt or .zip) is one document."""
    del options
    data = aozora.unzip(file.read(aozora.MAX_BYTES + 1), path)
    check_text(data, path)
    check_encoding(data, path)
    yield aozora.plain_text(data, path)


READERS = {"text": read_text, "jsonl": read_jsonl, "parquet": read_parquet, "aozora": read_aozora}


def read_file(kind: str, files: fsspec.AbstractFileSystem, path: str, options: Options) -> Iterator[str]:
    """The documents of a file; `kind` is a key of READERS."""
    with files.open(path, "rb", block_size=BUFFER_BYTES) as raw:
        yield from READERS[kind](decompressed(raw, path), path, options)


class Files(Source):
    """All files that a glob names, in the order of their names, each a shard. Their one split is `train`."""

    splits = ("train",)

    def __init__(self, kind: str, pattern: str, options: Options = Options()):
        """`kind` is a key of READERS; `pattern` a path, URL or glob, ** included."""
        super().__init__()
        self._kind, self._options = kind, options
        with library_errors(lambda: f"{pattern} cannot be listed"):
            self._files, self._infos = list_files(pattern)
        if not self._infos:
            raise UserError(f"No file matches {pattern!r} (dataset {kind}:{pattern}).")

    @functools.cached_property
    def files(self) -> list[str]:
        """See Source; no links in local ones."""
        paths = [info["name"] for info in self._infos]
        if isinstance(self._files, LocalFileSystem):
            return [os.path.realpath(path) for path in paths]
        return [self._files.unstrip_protocol(path) for path in paths]

    def num_shards(self, split: str) -> int:
        """See Source."""
        del split
        return len(self._infos)

    def shard_name(self, split: str, shard: int) -> str:
        """See Source."""
        del split
        return self._infos[shard]["name"]

    def read_shard(self, split: str, shard: int, start: int = 0) -> Iterator[str]:
        """See Source."""
        path = self.shard_name(split, shard)
        return itertools.islice(read_file(self._kind, self._files, path, self._options), start, None)

    def count_shard(self, split: str, shard: int) -> int:
        """See Source; Parquet files know how many rows they have."""
        if self._kind != "parquet":
            return super().count_shard(split, shard)
        path = self.shard_name(split, shard)
        with self._files.open(path, "rb", block_size=BUFFER_BYTES) as raw:
            return open_parquet(decompressed(raw, path), path).metadata.num_rows

    @property
    def fingerprint(self) -> str:
        """A hash of the files' names and sizes, and of their versions or times of change."""
        versions = ("mtime", "etag", "ETag", "md5Hash", "generation", "LastModified", "Last-Modified")
        facts = []
        for info in self._infos:
            facts.append([info["name"], info["size"], *(str(info[name]) for name in versions if name in info)])
        return hashlib.sha256(json.dumps([facts, self._options.text_field]).encode()).hexdigest()


def check_field(name: str, names: Collection[str], complaint: str):
    """Raises UserError, which begins with `complaint`, where a name is not among a source's."""
    if name not in names:
        raise UserError(f"{complaint} {name!r}; it has {', '.join(names)}: set text_field.")


def check_text_value(text, where: str, field: str) -> str:
    """The text as it is; raises UserError where it is none. A missing text (null) counts as empty."""
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: {field!r} is a {type(text).__name__}, not a string; set text_field.")
    return text or ""


def check_texts(texts: Iterable, where: str, field: str) -> Iterator[str]:
    """Each as `check_text_value` gives it."""
    for text in texts:
        yield check_text_value(text, where, field)


def _decode(line: bytes, path: str, number: int) -> str:
    check_encoding(line, f"{path}, line {number}")
    try:
        return line.decode("utf-8-sig")  # a byte order mark may stand where files were joined, too
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start}); convert the file, for example "
            "with iconv -f SHIFT_JIS -t UTF-8."
        ) from error
