"""Corpus -> tokenizer and packed token rows on disk.

A prepared corpus is a folder of ArrayRecord files and a manifest. The folder's name is a hash of all that determines
its content, so that a changed corpus, tokenizer or row length never meets stale rows. The corpus is worked on in
blocks of consecutive documents, one file each; a block's file appears under its name only when it is whole, and the
manifest only when all blocks are there. Whoever is interrupted goes on where it stopped, and ends with the same bytes.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from absl import logging
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from transformer_lm import console, corpora, packing, tokenizer
from transformer_lm.errors import UserError
from transformer_lm.files import write_atomically

FORMAT_VERSION = 1
BLOCK_CHARS = 4_000_000  # a block is closed by the document with which it reaches this many characters
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which corpus, which tokenizer, which rows.

    Attributes:
      dataset_name: the training corpus, as `corpora.open_documents` takes it.
      train_split: its split.
      eval_dataset_name: the evaluation corpus; None for the training corpus.
      eval_split: its split.
      vocab_path: where the tokenizer lies or is to be written; None for workdir/sentencepiece_model.
      vocab_size: pieces of a tokenizer that is trained here.
      max_corpus_chars: characters that it is trained on.
      spm_train_options: further options for SentencePiece's trainer.
      max_target_length: length of training rows.
      max_eval_target_length: length of evaluation rows.
      prepared_dir: where prepared corpora lie; None for workdir/prepared.
      prepare_processes: processes that tokenize; 0 for one a core.
    """

    dataset_name: str
    train_split: str
    eval_dataset_name: str | None
    eval_split: str
    vocab_path: str | None
    vocab_size: int
    max_corpus_chars: int
    spm_train_options: str
    max_target_length: int
    max_eval_target_length: int
    prepared_dir: str | None
    prepare_processes: int

    def __post_init__(self):
        for name in ("vocab_size", "max_corpus_chars"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("max_target_length", "max_eval_target_length"):
            if getattr(self, name) < 2:
                raise UserError(f"{name}={getattr(self, name)} must be at least 2.")
        if self.prepare_processes < 0:
            raise UserError(f"prepare_processes={self.prepare_processes} must be 0 (one a core) or more.")


@dataclasses.dataclass(frozen=True)
class PreparedCorpus:
    """Packed rows on disk.

    Attributes:
      directory: the folder they lie in.
      manifest: what they are and where they come from; see `prepare_rows` for its fields.
    """

    directory: Path
    manifest: dict

    @classmethod
    def load(cls, directory: Path) -> "PreparedCorpus":
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


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """All that training reads."""

    tokenizer: tokenizer.Tokenizer
    tokenizer_path: epath.Path
    train: PreparedCorpus
    eval: PreparedCorpus


def prepare(config: DataConfig, workdir: str) -> PreparedData:
    """Makes what is missing of tokenizer, training rows and evaluation rows, and finds what is there.

    Raises:
      UserError: a dataset or split does not exist (before any long work), or its content cannot be used.
    """
    for name, path in (("--workdir", workdir), ("prepared_dir", config.prepared_dir)):
        if "://" in (path or ""):
            raise UserError(f"{name}={path}: only local folders can be written to yet.")
    train_documents = corpora.open_documents(config.dataset_name, config.train_split)
    eval_documents = corpora.open_documents(config.eval_dataset_name or config.dataset_name, config.eval_split)
    tokenizer_path = epath.Path(config.vocab_path or epath.Path(workdir) / "sentencepiece_model").expanduser()
    spm = tokenizer.load_or_train(
        tokenizer_path,
        train_documents,
        vocab_size=config.vocab_size,
        max_corpus_chars=config.max_corpus_chars,
        options=config.spm_train_options,
    )
    if spm.vocab_size != config.vocab_size:
        logging.info("The tokenizer at %s has %d pieces; so has the model.", tokenizer_path, spm.vocab_size)
    root = Path(config.prepared_dir or Path(workdir) / "prepared").expanduser()
    rows = functools.partial(
        prepare_rows, tokenizer_path=tokenizer_path, tokenizer=spm, root=root, processes=config.prepare_processes
    )
    return PreparedData(
        spm,
        tokenizer_path,
        rows(train_documents, row_length=config.max_target_length),
        rows(eval_documents, row_length=config.max_eval_target_length),
    )


def prepare_rows(
    documents: corpora.Documents,
    *,
    tokenizer: tokenizer.Tokenizer,
    tokenizer_path: epath.Path,
    row_length: int,
    root: Path,
    processes: int = 0,
) -> PreparedCorpus:
    """Tokenizes and packs documents into rows under `root`, unless that has been done.

    The manifest says what made the rows (dataset_name, split, source_fingerprint, tokenizer_sha256, vocab_size,
    row_length, format_version, dtype) and counts documents, empty_documents (left out), characters and bytes (UTF-8)
    of the texts, tokens (EOS included), rows, and padding (slots without a token).
    """
    identity = {
        "dataset_name": documents.name,
        "split": documents.split,
        "source_fingerprint": documents.source.fingerprint,
        "tokenizer_sha256": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "row_length": row_length,
        "format_version": FORMAT_VERSION,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    directory = root / digest
    if (directory / MANIFEST).exists():
        return PreparedCorpus.load(directory)
    directory.mkdir(parents=True, exist_ok=True)
    work = functools.partial(_write_block, directory, str(tokenizer_path), row_length)
    blocks = _run(work, _blocks(documents), processes, f"Preparing {documents.name} {documents.split}")
    counts = {name: sum(block[name] for block in blocks) for name in (blocks[0] if blocks else [])}
    if not counts.get("documents"):
        shutil.rmtree(directory)
        raise UserError(f"Dataset {documents.name!r}, split {documents.split!r}, holds no text.")
    for leftover in directory.glob("*.tmp*"):  # of a preparation that was killed
        leftover.unlink()
    manifest = identity | {
        "dtype": packing.row_dtype(tokenizer.vocab_size).name,
        **counts,
        "files": [f"{_block_name(i)}.arrayrecord" for i in range(len(blocks))],
    }
    write_atomically(directory / MANIFEST, json.dumps(manifest, ensure_ascii=False, indent=1).encode())
    logging.info(
        "%s %s: %d documents, %d characters, %d tokens (%.2f characters a token), %d rows of %d, %.2f %% padding.",
        documents.name, documents.split, counts["documents"], counts["characters"], counts["tokens"],
        counts["characters"] / counts["tokens"], counts["rows"], row_length,
        100 * counts["padding"] / (counts["rows"] * row_length),
    )  # fmt: skip
    return PreparedCorpus(directory, manifest)


def _blocks(documents: Iterable[str]) -> Iterator[list[str]]:
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


def _block_name(number: int) -> str:
    return f"rows-{number:05d}"


def _write_block(directory: Path, tokenizer_path: str, row_length: int, number: int, block: list[str]) -> dict:
    """Packs a block's documents, in shuffled order, into one file; returns its counts and leaves them beside it."""
    spm = _load_tokenizer(tokenizer_path)
    texts = [text for text in block if text.strip()]
    order = np.random.default_rng(number).permutation(len(texts))
    texts = [texts[i] for i in order]
    ids = spm.encode_texts(texts)
    dtype = packing.row_dtype(spm.vocab_size)
    path = directory / f"{_block_name(number)}.arrayrecord"
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
    rows = 0
    for row in packing.pack(ids, row_length, dtype):
        writer.write(row.tobytes())
        rows += 1
    writer.close()
    temporary.replace(path)
    tokens = sum(map(len, ids))
    counts = {
        "documents": len(texts),
        "empty_documents": len(block) - len(texts),
        "characters": sum(map(len, texts)),
        "bytes": sum(len(text.encode()) for text in texts),
        "tokens": tokens,
        "rows": rows,
        "padding": rows * row_length - tokens,
    }
    write_atomically(path.with_suffix(".json"), json.dumps(counts).encode())
    return counts


@functools.cache
def _load_tokenizer(path: str) -> tokenizer.Tokenizer:
    return tokenizer.Tokenizer.load(path)


def _run(work, blocks: Iterator[list[str]], processes: int, title: str) -> list[dict]:
    """Does the blocks that are not done yet, in processes, with a progress bar; returns the counts of all."""
    directory = work.args[0]
    results: dict[int, dict] = {}
    waiting: dict[concurrent.futures.Future, int] = {}
    processes = processes or os.cpu_count() or 1
    with console.progress(title) as report, _pool(processes) as pool:

        def collect(when):
            for future in concurrent.futures.wait(waiting, return_when=when).done:
                results[waiting.pop(future)] = future.result()
                report(sum(counts["characters"] for counts in results.values()))

        for number, block in enumerate(blocks):
            counts_path = directory / f"{_block_name(number)}.json"
            if counts_path.exists():
                results[number] = json.loads(counts_path.read_text())
                continue
            waiting[pool.submit(work, number, block)] = number
            if len(waiting) > processes:
                collect(concurrent.futures.FIRST_COMPLETED)
        collect(concurrent.futures.ALL_COMPLETED)
    return [results[number] for number in sorted(results)]


def _pool(processes: int) -> concurrent.futures.ProcessPoolExecutor:
    """Worker processes; spawned, since JAX's threads do not survive a fork. Ctrl-C is the parent's to handle."""
    return concurrent.futures.ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
