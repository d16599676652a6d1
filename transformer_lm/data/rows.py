"""Prepared rows on disk: their folder, their manifest, one block of them.

A prepared corpus is a folder of ArrayRecord files and a manifest. The folder's name is a hash of all that determines
its content, so that a changed corpus, tokenizer or row length never meets stale rows. The corpus is worked on in
blocks of consecutive documents, one file each; a block's counts appear only when its file is whole, and the manifest
only when all blocks are there. Both know how long each file is and its checksum, so that one which was damaged later is
found, and made again.
"""

import dataclasses
import functools
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from transformer_lm.data import corpora, dataset_preprocessor, packing
from transformer_lm.data.dataset_preprocessor import Preprocessing
from transformer_lm.data.encoding import encode_conversations, encode_texts
from transformer_lm.errors import UserError
from transformer_lm.fields import check_value
from transformer_lm.files import (
    children,
    is_remote,
    json_bytes,
    json_object,
    local_copy,
    read_json,
    remove,
    sizes_in,
    utf8_name,
    write_atomically,
    write_file_atomically,
)
from transformer_lm.tokenizer import UNK_ID, Tokenizer
from transformer_lm.version import __version__

FORMAT_VERSION = 3
BLOCK_CHARS = 4_000_000  # a block is closed by the document with which it reaches this many characters
MANIFEST = "manifest.json"
RECORDS = ".arrayrecord"
# Of files whose checksums are compared at each start, in some seconds; of larger corpora only the lengths are.
MAX_CHECKED_BYTES = 4 << 30
MAX_DECODED_TEXTS = 100  # of a block, to see what does not come back
# What is counted of a block, and of all of them.
COUNTS = (
    "documents", "empty_documents", "texts", "nul_characters", "lone_surrogates", "characters", "bytes", "tokens",
    "unknown_tokens", "decoded_characters", "lost_characters", "rows", "padding",
)  # fmt: skip
# What every manifest has, of whichever version.
MANIFEST_FIELDS = {name: str for name in ("dataset_name", "split", "dtype")} | {
    name: int for name in ("row_length", "documents", "texts", "characters", "bytes", "tokens", "rows", "padding")
}
# What is said of rows where the field of the manifest is not 0.
REPORTED = {
    "documents": "%(documents)d documents, %(texts)d texts, %(characters)d characters, %(tokens)d tokens "
    "(%(characters_per_token).2f characters each), %(rows)d rows of %(row_length)d, %(padding_percent).2f %% padding",
    "empty_documents": "left out %(empty_documents)d documents without text, or whose turns are in no order",
    "nul_characters": "left out %(nul_characters)d NUL characters",
    "lone_surrogates": "replaced %(lone_surrogates)d halves of surrogate pairs by U+FFFD",
    "unknown_tokens": "%(unknown_tokens)d tokens are unknown pieces, which lose what they stand for",
    "lost_characters": "%(lost_percent).2g %% of the characters do not come back from tokens: they count, but are not "
    "predicted, so that bits a character are too low by about as much",
}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents, and what leads from them to texts.

    Attributes:
      documents: where they come from.
      preprocessing: from a document to its texts.
      identity: all that determines the texts, for the manifest: dataset_name, split, source_fingerprint, preprocessor,
        unicode_normalization, preprocessing_fingerprint; of a cleaned corpus also the rules and what they removed.
      weight: share in a mixture.
    """

    documents: corpora.Documents
    preprocessing: Preprocessing
    identity: dict
    weight: float = 1.0

    @classmethod
    def open(cls, documents: corpora.Documents, preprocessing: Preprocessing, weight: float = 1.0) -> "Corpus":
        """A corpus as its source has it."""
        identity = {
            "dataset_name": documents.name,
            "split": documents.split,
            "source_fingerprint": documents.source.fingerprint,
            **dataclasses.asdict(preprocessing),
            "preprocessing_fingerprint": preprocessing.fingerprint,
        }
        return cls(documents, preprocessing, identity, weight)

    @property
    def title(self) -> str:
        """Dataset and split, for messages."""
        return f"{self.identity['dataset_name']} {self.identity['split']}"


class PreparedRows:
    """Rows to train or evaluate on: a `PreparedCorpus`, or a `PreparedMixture` of several with their weights."""

    parts: tuple["PreparedCorpus", ...]
    weights: tuple[float, ...]

    @property
    def dtype(self) -> np.dtype:
        """Of the rows: uint16 or uint32."""
        return np.dtype(self.parts[0].manifest["dtype"])

    @property
    def row_length(self) -> int:
        """T."""
        return self.parts[0].manifest["row_length"]


@dataclasses.dataclass(frozen=True)
class PreparedCorpus(PreparedRows):
    """Packed rows on disk.

    Attributes:
      directory: the folder they lie in.
      manifest: what they are and where they come from; see `prepare_rows` for its fields.
    """

    directory: epath.Path
    manifest: dict

    @classmethod
    def find(cls, directory: epath.Path) -> "PreparedCorpus | None":
        """The rows in a folder; None unless every file is as it was written, see `are_whole`."""
        manifest = read_manifest(directory)
        return cls(directory, manifest) if manifest and _has_files(directory, manifest) else None

    @classmethod
    def open(cls, directory: epath.Path) -> "PreparedCorpus":
        """The rows in a folder in which another process has just found or made them."""
        return cls(directory, read_json(directory / MANIFEST))

    @property
    def paths(self) -> list[str]:
        """The ArrayRecord files, in order."""
        folder = epath.Path(utf8_name(self.directory))
        return [str(folder / name) for name in self.manifest["files"]]

    @functools.cached_property
    def files(self) -> list["RowsFile"]:
        """What is known of the files, in order."""
        names, checksums = self.manifest["files"], self.manifest["checksums"]
        counts = self.manifest.get("rows_of_files") or map(_count_rows, self.paths)  # older manifests have none
        facts = zip(self.paths, names, counts, strict=True)
        return [RowsFile(path, rows, *checksums[name]) for path, name, rows in facts]

    @property
    def parts(self) -> tuple["PreparedCorpus", ...]:
        """As of a mixture: itself."""
        return (self,)

    @property
    def weights(self) -> tuple[float, ...]:
        """As of a mixture."""
        return (1.0,)


def read_manifest(directory: epath.Path) -> dict | None:
    """What the manifest in a folder says; None where there is none, or one that is cut, or lacks what all have."""
    try:
        manifest = read_json(directory / MANIFEST)
        for name, kind in MANIFEST_FIELDS.items():
            check_value(name, manifest.get(name), kind)
        return manifest
    except (FileNotFoundError, NotADirectoryError, UserError):
        return None


def _has_files(directory: epath.Path, manifest: dict) -> bool:
    """Whether the files that a manifest names, at least one, are as they were written."""
    try:
        files, counts = manifest["checksums"], manifest.get("rows_of_files")
        named = list(files) == manifest["files"] and len(counts or files) == len(files) > 0
        return named and are_whole(directory, files)
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):  # what was edited, or is gone
        return False


class RowsFile(NamedTuple):
    """A file of rows: how many there are, its bytes, and their CRC-32."""

    path: str
    rows: int
    size: int
    checksum: int


def _count_rows(path: str) -> int:
    reader = ArrayRecordReader(str(local_copy(path)))
    return reader.num_records()


@dataclasses.dataclass(frozen=True)
class PreparedMixture(PreparedRows):
    """Several prepared corpora, each with its share of the rows.

    Attributes:
      parts: the corpora.
      weights: their shares, which sum to 1.
    """

    parts: tuple[PreparedCorpus, ...]
    weights: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class RowsPlan:
    """What rows are to be made, and where.

    Attributes:
      corpus: what they hold.
      tokenizer: what cuts the texts into tokens; worker processes load it from its source.
      row_length: T.
      root: the folder below which the rows' own folder lies.
    """

    corpus: Corpus
    tokenizer: Tokenizer
    row_length: int
    root: epath.Path

    @functools.cached_property
    def identity(self) -> dict:
        """All that determines the rows."""
        return self.corpus.identity | {
            "tokenizer_sha256": self.tokenizer.fingerprint,
            "vocab_size": self.tokenizer.vocab_size,
            "row_length": self.row_length,
            "format_version": FORMAT_VERSION,
        }

    @property
    def directory(self) -> epath.Path:
        """The rows' own folder."""
        return self.root / digest(self.identity)

    @property
    def write_block(self) -> Callable[[str, list[str]], dict]:
        """`write_block` with all but the block's name and documents filled in; can be sent to other processes."""
        arguments = (str(self.directory), self.tokenizer.source, self.row_length, self.corpus.preprocessing)
        return functools.partial(write_block, *arguments)


def digest(identity: dict) -> str:
    """A short name for what an identity determines."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def finish_rows(plan: RowsPlan, names: list[str]) -> PreparedCorpus:
    """Writes the manifest of rows whose blocks (`names`, in order) are all there.

    The manifest says what made the rows (dataset_name, split, source_fingerprint, preprocessor, unicode_normalization,
    tokenizer_sha256, vocab_size, row_length, format_version, dtype, transformer_lm_version; of a cleaned corpus by
    which rules, and how many texts each removed) and counts documents, empty_documents (without a text), texts,
    nul_characters (removed), lone_surrogates (replaced by U+FFFD), characters and bytes (UTF-8) of the texts, tokens
    (EOS included), unknown_tokens, lost_characters (which do not come back from the tokens, of the decoded_characters
    that were tried), rows, and padding (slots without a token).
    """
    directory = plan.directory
    blocks = {name: _read_json(directory, name) for name in names}
    counts = Counter()
    for block in blocks.values():
        counts.update(block["counts"])
    if not counts["texts"]:
        directory.rmtree()
        raise UserError(f"Dataset {plan.corpus.title} holds no text.")
    for path in children(directory):  # of preparations that were killed, or done with other numbers of tasks
        if path.stem not in blocks:
            remove(path)
    checksums = {name + RECORDS: block["file"] for name, block in blocks.items() if block["counts"]["rows"]}
    manifest = plan.identity | {
        "dtype": packing.row_dtype(plan.tokenizer.vocab_size, plan.corpus.preprocessing.has_turns).name,
        "transformer_lm_version": __version__,
        **counts,
        "characters_per_token": round(counts["characters"] / counts["tokens"], 4),
        "files": list(checksums),
        "checksums": checksums,
        "rows_of_files": [block["counts"]["rows"] for block in blocks.values() if block["counts"]["rows"]],
    }
    write_atomically(directory / MANIFEST, json_bytes(manifest))
    _report(plan.corpus.title, manifest)
    return PreparedCorpus(directory, manifest)


def _report(title: str, manifest: dict):
    """Logs what there is, and what is not as it was in the source."""
    facts = manifest | {
        "title": title,
        "padding_percent": 100 * manifest["padding"] / (manifest["rows"] * manifest["row_length"]),
        "lost_percent": 100 * manifest["lost_characters"] / manifest["decoded_characters"],
    }
    for name, what in REPORTED.items():
        if manifest[name]:
            logging.info(f"%(title)s: {what}.", facts)


def read_block(directory: epath.Path, name: str) -> dict | None:
    """What a block's JSON says of it: `counts` and `file` (length and checksum); None where it is not whole."""
    try:
        block = _read_json(directory, name)
        for count in COUNTS:
            check_value(count, block["counts"].get(count), int)
        whole = not block["counts"]["rows"] or _is_whole(directory / (name + RECORDS), *block["file"])
    except FileNotFoundError:
        return None
    except (UserError, TypeError, KeyError, AttributeError):
        whole = False
    if whole:
        return block
    logging.warning("The block %s of prepared rows is damaged: it is made again.", directory / name)
    return None


def _read_json(directory: epath.Path, name: str) -> dict:
    path = directory / f"{name}.json"
    return json_object(path.read_bytes(), path)


def _is_whole(path: epath.Path, size: int, checksum: int) -> bool:
    """Whether a file has a length and a checksum, which object stores see to themselves."""
    if not path.exists() or path.stat().length != size:
        return False
    return is_remote(path) or checksum_of(path) == checksum


def are_whole(directory: epath.Path, checksums: dict[str, Sequence[int | None]]) -> bool:
    """Whether files in a folder, by name, have their lengths and (see MAX_CHECKED_BYTES) their checksums, if any."""
    sizes = sizes_in(directory)
    if not all(sizes.get(name) == size for name, (size, _) in checksums.items()):
        return False
    if is_remote(directory) or sum(size for size, _ in checksums.values()) > MAX_CHECKED_BYTES:
        return True
    known = {name: checksum for name, (_, checksum) in checksums.items() if checksum is not None}
    return all(checksum_of(directory / name) == checksum for name, checksum in known.items())


def checksum_of(path: epath.Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            value = zlib.crc32(part, value)
    return value


def blocks_of(documents: Iterable[str]) -> Iterator[list[str]]:
    """Consecutive documents in lists of about BLOCK_CHARS characters."""
    block, chars = [], 0
    for document in documents:
        block.append(document)
        chars += len(document)
        if chars >= BLOCK_CHARS:
            yield block
            block, chars = [], 0
    if block:
        yield block


def write_block(
    directory: str, tokenizer_path: str, row_length: int, preprocessing: Preprocessing, name: str, block: list[str]
) -> dict:
    """Packs a block's texts, in shuffled order, into one file; returns its counts and leaves them beside it."""
    spm = _load_tokenizer(tokenizer_path)
    texts, empty, impossible = [], 0, Counter()
    for document in block:
        impossible.update(dataset_preprocessor.without_impossible_characters(document)[1])
        found = preprocessing(document)
        empty += not found
        texts += found
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())
    texts = [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))]
    encode = encode_conversations if preprocessing.has_turns else encode_texts
    encoded = encode(spm, texts)
    dtype = packing.row_dtype(spm.vocab_size, preprocessing.has_turns)
    records = [row.record() for row in packing.pack((one.tokens for one in encoded), row_length, dtype)]
    texts, ids = [one.text for one in encoded], [one.tokens[:, 0] % packing.UNSCORED for one in encoded]
    tokens = sum(map(len, ids))
    decoded = list(zip(texts, ids, strict=True))[:MAX_DECODED_TEXTS]
    counts = {
        "documents": len(block),
        "empty_documents": empty,
        "texts": len(texts),
        **impossible,
        "characters": sum(map(len, texts)),
        "bytes": sum(len(text.encode()) for text in texts),
        "tokens": tokens,
        "unknown_tokens": sum(int(np.sum(tokens == UNK_ID)) for tokens in ids),
        "decoded_characters": sum(len(text) for text, _ in decoded),
        "lost_characters": sum((Counter(text) - Counter(spm.decode(tokens))).total() for text, tokens in decoded),
        "rows": len(records),
        "padding": len(records) * row_length - tokens,
    }
    file = _write_records(epath.Path(directory) / (name + RECORDS), records) if records else (0, 0)
    content = {"counts": counts, "file": file}
    write_atomically(epath.Path(directory) / f"{name}.json", json.dumps(content).encode())
    return counts


def _write_records(path: epath.Path, records: list[bytes]) -> tuple[int, int]:
    """Writes an ArrayRecord file; returns its length and checksum."""

    def write(temporary: str) -> tuple[int, int]:
        try:
            folder, name = os.path.split(temporary)
            writer = ArrayRecordWriter(os.path.join(utf8_name(folder), name), "group_size:1,uncompressed")
            for record in records:
                writer.write(record)
            writer.close()
        except RuntimeError as error:  # a full disk, say
            raise OSError(f"{path} cannot be written: {error}") from error
        return os.path.getsize(temporary), checksum_of(epath.Path(temporary))

    return write_file_atomically(path, write)


_load_tokenizer = functools.cache(Tokenizer.load)
