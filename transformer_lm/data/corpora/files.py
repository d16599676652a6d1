"""Documents in files, local or remote: `text:GLOB`, `jsonl:GLOB`, `parquet:GLOB`, `aozora:GLOB`.

Each may be compressed (.gz, .xz, .bz2, .zst), and may lie wherever fsspec reaches: a path, gs://, s3://, https://.
"""

import bz2
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

import fsspec

from transformer_lm.data.corpora import aozora
from transformer_lm.data.corpora.base import Options, Source
from transformer_lm.errors import UserError
from transformer_lm.extras import optional_import

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

BUFFER_BYTES = 1 << 20
PARQUET_ROWS = 256
DECOMPRESSORS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": zstd.open}
EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3", "http": "http", "https": "http"}


def read_text(file: BinaryIO, path: str, options: Options) -> Iterator[str]:
    """Documents are separated by blank lines; a file without one is a single document."""
    del options
    lines: list[str] = []
    for number, line in enumerate(file, 1):
        if line.strip():
            lines.append(_decode(line, path, number))
        elif lines:
            yield "".join(lines).rstrip("\r\n")
            lines = []
    if lines:
        yield "".join(lines).rstrip("\r\n")


def read_jsonl(file: BinaryIO, path: str, options: Options) -> Iterator[str]:
    """One JSON object a line, the document in its field `options.text_field`."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        line = _decode(line, path, number)
        try:
            text = json.loads(line)[options.text_field]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}, line {number}: not a JSON object with a field {options.text_field!r} ({error!r}); "
                "mend the line, or set text_field."
            ) from error
        if not isinstance(text, str):
            raise UserError(
                f"{path}, line {number}: field {options.text_field!r} is a {type(text).__name__}, no string."
            )
        yield text


def read_parquet(file: BinaryIO, path: str, options: Options) -> Iterator[str]:
    """One document a row, in the column `options.text_field`."""
    return check_texts(parquet_column(file, path, options.text_field), path, options.text_field)


def parquet_column(file: BinaryIO, path: str, name: str) -> Iterator:
    """The values of a column of a Parquet file, a few hundred rows in memory at a time."""
    parquet = optional_import("pyarrow.parquet", "hf", "Reading Parquet")
    try:
        table = parquet.ParquetFile(file)
        if name not in table.schema_arrow.names:
            names = ", ".join(table.schema_arrow.names)
            raise UserError(f"{path} has no column {name!r}; it has {names}: set text_field.")
        for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=[name]):
            yield from batch.column(0).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow.ArrowInvalid is a ValueError
        raise UserError(f"{path} cannot be read as Parquet: {error}") from error


def read_aozora(file: BinaryIO, path: str, options: Options) -> Iterator[str]:
    """A work of Aozora Bunko as it is published there (Shift_JIS, its notation, .txt or .zip) is one document."""
    del options
    yield aozora.plain_text(aozora.unzip(file.read(), path), path)


Reader = Callable[[BinaryIO, str, Options], Iterator[str]]
READERS: dict[str, Reader] = {
    "text": read_text,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "aozora": read_aozora,
}


class Files(Source):
    """All files that a glob names, in the order of their names, each a shard. Their one split is `train`."""

    splits = ("train",)

    def __init__(self, kind: str, pattern: str, options: Options = Options()):
        """`kind` is a key of READERS; `pattern` a path, URL or glob, ** included."""
        super().__init__()
        self._reader, self._options = READERS[kind], options
        pattern = os.path.expanduser(pattern)
        try:
            self._files, _ = fsspec.core.url_to_fs(pattern)
            found = self._files.glob(pattern, detail=True)
        except (ImportError, ValueError) as error:
            protocol = pattern.partition("://")[0]
            if protocol not in EXTRAS:
                raise UserError(f"dataset {kind}:{pattern}: {error}") from error
            raise UserError(
                f"Reading {pattern} needs another package: pip install 'transformer-lm-japanese[{EXTRAS[protocol]}]'."
            ) from error
        except Exception as error:  # whatever a remote file system raises
            raise UserError(f"{pattern} cannot be listed: {error!r}") from error
        self._infos = [found[path] for path in sorted(found) if found[path]["type"] == "file"]
        if not self._infos:
            raise UserError(f"No file matches {pattern!r} (dataset {kind}:{pattern}).")

    def num_shards(self, split: str) -> int:
        """See Source."""
        del split
        return len(self._infos)

    def read_shard(self, split: str, shard: int, start: int = 0) -> Iterator[str]:
        """See Source."""
        del split
        path = self._infos[shard]["name"]
        try:
            with self._files.open(path, "rb", block_size=BUFFER_BYTES) as raw:
                opener = DECOMPRESSORS.get(os.path.splitext(path)[1].lower())
                file = io.BufferedReader(opener(raw), BUFFER_BYTES) if opener else raw
                yield from itertools.islice(self._reader(file, path, self._options), start, None)
        except (EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError, OSError) as error:
            raise UserError(f"{path} cannot be read to its end: {error}") from error

    @property
    def fingerprint(self) -> str:
        """A hash of the files' names and sizes, and of their versions or times of change."""
        versions = ("mtime", "etag", "ETag", "md5Hash", "generation", "LastModified", "Last-Modified")
        facts = [
            (info["name"], info["size"], *(str(info[name]) for name in versions if name in info))
            for info in self._infos
        ]
        return hashlib.sha256(json.dumps([facts, self._options.text_field]).encode()).hexdigest()


def check_texts(texts: Iterable, where: str, field: str) -> Iterator[str]:
    """The texts as they are; raises UserError where one is none. A missing text (null) counts as empty."""
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise UserError(f"{where}: {field!r} is a {type(text).__name__}, not a string; set text_field.")
        yield text or ""


def _decode(line: bytes, path: str, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start}); convert the file, for example "
            "with iconv -f SHIFT_JIS -t UTF-8."
        ) from error
