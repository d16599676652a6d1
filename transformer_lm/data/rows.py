"""Prepared rows on disk: their folder, their manifest, one block of them.

A prepared corpus is a folder of ArrayRecord files and a manifest. The folder's name is a hash of all that determines
its content, so that a changed corpus, tokenizer or row length never meets stale rows. The corpus is worked on in
blocks of consecutive documents, one file each; a block's counts appear only when its file is whole, and the manifest
only when all blocks are there.
"""

import dataclasses
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from absl import logging
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from transformer_lm.data import corpora, dataset_preprocessor, packing
from transformer_lm.data.dataset_preprocessor import Preprocessing
from transformer_lm.errors import UserError
from transformer_lm.files import children, write_atomically, write_file_atomically
from transformer_lm.tokenizer import Tokenizer
from transformer_lm.version import __version__

FORMAT_VERSION = 2
BLOCK_CHARS = 4_000_000  # a block is closed by the document with which it reaches this many characters
MANIFEST = "manifest.json"


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
            "preprocessor": preprocessing.preprocessor,
            "unicode_normalization": preprocessing.unicode_normalization,
            "preprocessing_fingerprint": preprocessing.fingerprint,
        }
        return cls(documents, preprocessing, identity, weight)

    @property
    def title(self) -> str:
        """Dataset and split, for messages."""
        return f"{self.identity['dataset_name']} {self.identity['split']}"

    def texts(self) -> Iterator[str]:
        """All texts, in order."""
        return dataset_preprocessor.texts_of(self.documents, self.preprocessing)


@dataclasses.dataclass(frozen=True)
class PreparedCorpus:
    """Packed rows on disk.

    Attributes:
      directory: the folder they lie in.
      manifest: what they are and where they come from; see `prepare_rows` for its fields.
    """

    directory: epath.Path
    manifest: dict

    @classmethod
    def load(cls, directory: epath.Path) -> "PreparedCorpus":
        """Reads the manifest of a folder."""
        return cls(directory, json.loads((directory / MANIFEST).read_text()))

    @property
    def paths(self) -> list[str]:
        """The ArrayRecord files, in order."""
        return [str(self.directory / name) for name in self.manifest["files"]]

    @property
    def dtype(self) -> np.dtype:
        """Of the rows: uint16 or uint32."""
        return np.dtype(self.manifest["dtype"])

    @property
    def row_length(self) -> int:
        """T."""
        return self.manifest["row_length"]

    @property
    def parts(self) -> tuple["PreparedCorpus", ...]:
        """As of a mixture: itself."""
        return (self,)

    @property
    def weights(self) -> tuple[float, ...]:
        """As of a mixture."""
        return (1.0,)


@dataclasses.dataclass(frozen=True)
class PreparedMixture:
    """Several prepared corpora, each with its share of the rows.

    Attributes:
      parts: the corpora.
      weights: their shares, which sum to 1.
    """

    parts: tuple[PreparedCorpus, ...]
    weights: tuple[float, ...]

    @property
    def dtype(self) -> np.dtype:
        """Of the rows."""
        return self.parts[0].dtype

    @property
    def row_length(self) -> int:
        """T."""
        return self.parts[0].row_length

    @property
    def manifest(self) -> dict:
        """Characters and bytes to one token of the mixture."""
        shares = list(zip(self.parts, self.weights, strict=True))
        return {
            name: sum(weight * part.manifest[name] / part.manifest["tokens"] for part, weight in shares)
            for name in ("tokens", "characters", "bytes")
        }


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
        preprocessing = self.corpus.preprocessing
        return functools.partial(
            write_block, str(self.directory), self.tokenizer.source, self.row_length, preprocessing
        )


def digest(identity: dict) -> str:
    """A short name for what an identity determines."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def finish_rows(plan: RowsPlan, names: list[str]) -> PreparedCorpus:
    """Writes the manifest of rows whose blocks (`names`, in order) are all there.

    The manifest says what made the rows (dataset_name, split, source_fingerprint, preprocessor, unicode_normalization,
    tokenizer_sha256, vocab_size, row_length, format_version, dtype, transformer_lm_version; of a cleaned corpus by
    which rules, and how many texts each removed) and counts documents, empty_documents (without a text), texts,
    nul_characters (removed), lone_surrogates (replaced by U+FFFD), characters and bytes (UTF-8) of the texts, tokens
    (EOS included), rows, and padding (slots without a token).
    """
    directory = plan.directory
    blocks = [json.loads((directory / f"{name}.json").read_text()) for name in names]
    counts = {name: sum(block[name] for block in blocks) for name in (blocks[0] if blocks else [])}
    if not counts.get("texts"):
        directory.rmtree()
        raise UserError(
            f"Dataset {plan.corpus.documents.name!r}, split {plan.corpus.documents.split!r}, holds no text."
        )
    files = [f"{name}.arrayrecord" for name, block in zip(names, blocks, strict=True) if block["rows"]]
    for path in children(directory):  # of preparations that were killed, or done with other numbers of tasks
        if path.name not in files and path.stem not in names:
            path.rmtree() if path.is_dir() else path.unlink()
    manifest = plan.identity | {
        "dtype": packing.row_dtype(plan.tokenizer.vocab_size).name,
        "transformer_lm_version": __version__,
        **counts,
        "characters_per_token": round(counts["characters"] / counts["tokens"], 4),
        "files": files,
    }
    write_atomically(
        directory / MANIFEST, json.dumps(manifest, ensure_ascii=False, indent=1).encode(errors="backslashreplace")
    )
    logging.info(
        "%s: %d documents, %d texts, %d characters, %d tokens (%.2f characters each), %d rows of %d, %.2f %% padding.",
        plan.corpus.title, counts["documents"], counts["texts"], counts["characters"], counts["tokens"],
        manifest["characters_per_token"], counts["rows"], plan.row_length,
        100 * counts["padding"] / (counts["rows"] * plan.row_length),
    )  # fmt: skip
    for name, what in (
        ("empty_documents", "left out %d documents without text"),
        ("nul_characters", "left out %d NUL characters"),
        ("lone_surrogates", "replaced %d halves of surrogate pairs by U+FFFD"),
    ):
        if counts.get(name):  # a block made before this was counted has no such count
            logging.info(f"%s: {what}.", plan.corpus.title, counts[name])
    return PreparedCorpus(directory, manifest)


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
    order = np.random.default_rng(seed).permutation(len(texts))
    ids = spm.encode_texts([texts[i] for i in order])
    dtype = packing.row_dtype(spm.vocab_size)
    rows = [row.tobytes() for row in packing.pack(ids, row_length, dtype)]
    if rows:
        write_file_atomically(epath.Path(directory) / f"{name}.arrayrecord", functools.partial(_write_records, rows))
    tokens = sum(map(len, ids))
    counts = {
        "documents": len(block),
        "empty_documents": empty,
        "texts": len(texts),
        **impossible,
        "characters": sum(map(len, texts)),
        "bytes": sum(len(text.encode()) for text in texts),
        "tokens": tokens,
        "rows": len(rows),
        "padding": len(rows) * row_length - tokens,
    }
    write_atomically(epath.Path(directory) / f"{name}.json", json.dumps(counts).encode())
    return counts


def _write_records(records: list[bytes], path: str):
    writer = ArrayRecordWriter(path, "group_size:1,uncompressed")
    for record in records:
        writer.write(record)
    writer.close()


@functools.cache
def _load_tokenizer(path: str) -> Tokenizer:
    return Tokenizer.load(path)
