"""Corpus -> tokenizer and packed token rows on disk.

A prepared corpus is a folder of ArrayRecord files and a manifest. The folder's name is a hash of all that determines
its content, so that a changed corpus, tokenizer or row length never meets stale rows. The corpus is worked on in
blocks of consecutive documents, one file each; a block's counts appear only when its file is whole, and the manifest
only when all blocks are there. Whoever is interrupted goes on where it stopped, and ends with the same bytes.

One machine does the work with processes of its own. For many, the same functions are steps of a datatrove pipeline
(`datatrove_steps.py`), which a `launcher.Launcher` runs.
"""

import concurrent.futures
import concurrent.futures.process
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from absl import logging
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from transformer_lm import __version__, console, tokenizer
from transformer_lm.data import cleaning, corpora, dataset_preprocessor, packing
from transformer_lm.data.dataset_preprocessor import Preprocessing
from transformer_lm.data.launcher import Launcher
from transformer_lm.errors import UserError
from transformer_lm.extras import optional_import
from transformer_lm.files import absolute, children, write_atomically, write_file_atomically

FORMAT_VERSION = 2
BLOCK_CHARS = 4_000_000  # a block is closed by the document with which it reaches this many characters
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which corpus, which tokenizer, which rows.

    Attributes:
      dataset_name: the training corpus, as `corpora.open_documents` takes it; or a mixture, [(name, weight), ...].
      train_split: its split.
      eval_dataset_name: the evaluation corpus, likewise; None for the training corpus.
      eval_split: its split.
      text_field: which field of a record holds the document.
      streaming: whether Hugging Face datasets are read from the hub without a copy on disk.
      preprocessor: a key of `dataset_preprocessor.PREPROCESSORS`; None for the dataset's own.
      unicode_normalization: "NFKC" and the like, "" for none.
      cleaning_rules: names of `cleaning.RULES` in order, separated by commas; "" for no cleaning.
      vocab_path: where the tokenizer lies or is to be written; None for workdir/sentencepiece_model.
      vocab_size: pieces of a tokenizer that is trained here.
      max_corpus_chars: characters that it is trained on.
      spm_train_options: further options for SentencePiece's trainer.
      max_target_length: length of training rows.
      max_eval_target_length: length of evaluation rows.
      prepared_dir: where prepared corpora lie; None for workdir/prepared.
      prepare_processes: processes that tokenize; 0 for one a core.
    """

    dataset_name: str | list
    train_split: str
    eval_dataset_name: str | list | None
    eval_split: str
    text_field: str
    streaming: bool
    preprocessor: str | None
    unicode_normalization: str
    cleaning_rules: str
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
        cleaning.parse_rules(self.cleaning_rules)

    @property
    def options(self) -> corpora.Options:
        """How sources are read."""
        return corpora.Options(self.text_field, self.streaming)


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
class PreparedData:
    """All that training reads."""

    tokenizer: tokenizer.Tokenizer
    train: PreparedCorpus | PreparedMixture
    eval: PreparedCorpus | PreparedMixture


def prepare(
    config: DataConfig, workdir: str, launcher: Launcher | None = None, tokenizer_source: epath.Path | None = None
) -> PreparedData:
    """Makes what is missing of tokenizer, training rows and evaluation rows, and finds what is there.

    Args:
      config: what to prepare.
      workdir: the run's folder, local or remote.
      launcher: where datatrove's tasks do the work; None for processes of this machine, which need no datatrove
        unless there is something to clean.
      tokenizer_source: a tokenizer to take where there is none, rather than train one.

    Raises:
      UserError: a dataset or split does not exist (before any long work), or its content cannot be used.
    """
    root = absolute(config.prepared_dir or epath.Path(workdir) / "prepared")
    train = open_corpora(config.dataset_name, config.train_split, config)
    evaluation = open_corpora(config.eval_dataset_name or config.dataset_name, config.eval_split, config)
    train, evaluation = (_cleaned(part, config, root, launcher) for part in (train, evaluation))
    tokenizer_path = absolute(config.vocab_path or epath.Path(workdir) / "sentencepiece_model")
    if tokenizer_source and not tokenizer_path.exists():
        write_atomically(tokenizer_path, tokenizer.Tokenizer.load(tokenizer_source).model)
    spm = tokenizer.load_or_train(
        tokenizer_path,
        [(corpus.texts(), corpus.weight) for corpus in train],
        vocab_size=config.vocab_size,
        max_corpus_chars=config.max_corpus_chars,
        options=config.spm_train_options,
    )
    if spm.vocab_size != config.vocab_size:
        logging.info("The tokenizer at %s has %d pieces; so has the model.", tokenizer_path, spm.vocab_size)
    rows = functools.partial(_rows_of, config=config, spm=spm, root=root, launcher=launcher)
    return PreparedData(
        spm,
        rows(train, row_length=config.max_target_length),
        rows(evaluation, row_length=config.max_eval_target_length),
    )


def prepare_evaluation(
    config: DataConfig, spm: tokenizer.Tokenizer, root: epath.Path
) -> PreparedCorpus | PreparedMixture:
    """The evaluation rows of a recipe alone, for a tokenizer read from a file; found or made below `root`."""
    evaluation = open_corpora(config.eval_dataset_name or config.dataset_name, config.eval_split, config)
    evaluation = _cleaned(evaluation, config, root, None)
    return _rows_of(evaluation, config.max_eval_target_length, config, spm, root, None)


def _rows_of(
    mixture: list[Corpus],
    row_length: int,
    config: DataConfig,
    spm: tokenizer.Tokenizer,
    root: epath.Path,
    launcher: Launcher | None,
) -> PreparedCorpus | PreparedMixture:
    """The rows of a corpus or a mixture, found or made."""
    parts = []
    for corpus in mixture:
        plan = RowsPlan(corpus, spm, row_length, root)
        if (plan.directory / MANIFEST).exists():
            parts.append(PreparedCorpus.load(plan.directory))
        else:
            parts.append(prepare_rows(plan, config.prepare_processes, launcher))
    return parts[0] if len(parts) == 1 else PreparedMixture(tuple(parts), tuple(part.weight for part in mixture))


def open_corpora(name: str | list, split: str, config: DataConfig) -> list[Corpus]:
    """The corpora of a dataset name or a mixture, their weights summing to 1."""
    parts = [(name, 1.0)] if isinstance(name, str) else name
    try:
        parts = [(str(part), float(weight)) for part, weight in parts]
        total = sum(weight for _, weight in parts)
        if not parts or not all(0 < weight < float("inf") for _, weight in parts):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise UserError(
            f"dataset_name={name!r} must be a name or a list of (name, weight) with weights above 0."
        ) from error
    return [
        Corpus.open(
            corpora.open_documents(part, split, config.options),
            dataset_preprocessor.for_dataset(part, config.preprocessor, config.unicode_normalization),
            weight / total,
        )
        for part, weight in parts
    ]


def _cleaned(mixture: list[Corpus], config: DataConfig, root: epath.Path, launcher: Launcher | None) -> list[Corpus]:
    """The corpora as they are, or cleaned where the recipe has rules."""
    if not config.cleaning_rules:
        return mixture
    launcher = launcher or cleaning.local_launcher(config.prepare_processes)
    return [_clean(corpus, config, root, launcher) for corpus in mixture]


def _clean(corpus: Corpus, config: DataConfig, root: epath.Path, launcher: Launcher) -> Corpus:
    """The corpus with only the texts that the rules keep, which are written to disk in between."""
    identity = corpus.identity | {"cleaning_rules": config.cleaning_rules, "cleaning_version": cleaning.VERSION}
    directory = root / f"cleaned-{_digest(identity)}"
    if not (directory / cleaning.REPORT).exists():
        rules = cleaning.parse_rules(config.cleaning_rules)
        cleaning.clean(corpus.documents, corpus.preprocessing, rules, directory, launcher)
    report = json.loads((directory / cleaning.REPORT).read_text())
    documents = corpora.open_documents(f"jsonl:{directory}/{report['texts']}/*.jsonl.gz", "train")
    return Corpus(documents, Preprocessing(), identity | {"cleaning_counts": report["counts"]}, corpus.weight)


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
    tokenizer: tokenizer.Tokenizer
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
        return self.root / _digest(self.identity)

    @property
    def write_block(self) -> Callable[[str, list[str]], dict]:
        """`write_block` with all but the block's name and documents filled in; can be sent to other processes."""
        preprocessing = self.corpus.preprocessing
        return functools.partial(
            write_block, str(self.directory), self.tokenizer.source, self.row_length, preprocessing
        )


def _digest(identity: dict) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def prepare_rows(plan: RowsPlan, processes: int = 0, launcher: Launcher | None = None) -> PreparedCorpus:
    """Tokenizes and packs documents into rows, with processes of this machine (0: one a core) or by a launcher."""
    plan.directory.mkdir(parents=True, exist_ok=True)
    if launcher is None:
        try:
            return finish_rows(plan, _run(plan, processes or os.cpu_count() or 1))
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UserError(
                "A process that prepares rows was killed, perhaps for want of memory. Run the same command to go on; "
                "with a smaller prepare_processes it needs less."
            ) from error
    optional_import("datatrove", "prep", f"--executor={launcher.executor}")
    from transformer_lm.data import datatrove_steps as steps

    documents = plan.corpus.documents
    documents.count()  # once here, not in every task
    logs = plan.directory / f"logs-{launcher.tasks}"
    launcher.run("pack", [steps.ReadDocuments(documents), steps.PackRows(plan)], logs)
    prefix = steps.rows_prefix(launcher.tasks)
    return finish_rows(plan, sorted(path.stem for path in plan.directory.glob(f"{prefix}*.json")))


def finish_rows(plan: RowsPlan, names: list[str]) -> PreparedCorpus:
    """Writes the manifest of rows whose blocks (`names`, in order) are all there.

    The manifest says what made the rows (dataset_name, split, source_fingerprint, preprocessor, unicode_normalization,
    tokenizer_sha256, vocab_size, row_length, format_version, dtype, transformer_lm_version; of a cleaned corpus by
    which rules, and how many texts each removed) and counts documents, empty_documents (without a text), texts,
    nul_characters (removed), characters and bytes (UTF-8) of the texts, tokens (EOS included), rows, and padding
    (slots without a token).
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
    write_atomically(directory / MANIFEST, json.dumps(manifest, ensure_ascii=False, indent=1).encode())
    logging.info(
        "%s: %d documents, %d texts, %d characters, %d tokens (%.2f characters each), %d rows of %d, %.2f %% padding.",
        plan.corpus.title, counts["documents"], counts["texts"], counts["characters"], counts["tokens"],
        manifest["characters_per_token"], counts["rows"], plan.row_length,
        100 * counts["padding"] / (counts["rows"] * plan.row_length),
    )  # fmt: skip
    for name, what in (("empty_documents", "documents without text"), ("nul_characters", "NUL characters")):
        if counts[name]:
            logging.info("%s: left out %d %s.", plan.corpus.title, counts[name], what)
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
    texts, empty, nuls = [], 0, 0
    for document in block:
        nuls += document.count("\0")
        found = preprocessing(document.replace("\0", ""))
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
        "nul_characters": nuls,
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
def _load_tokenizer(path: str) -> tokenizer.Tokenizer:
    return tokenizer.Tokenizer.load(path)


def _run(plan: RowsPlan, processes: int) -> list[str]:
    """Does the blocks that are not done yet, in processes, with a progress bar; returns the names of all."""
    names: list[str] = []
    characters = 0
    waiting: set[concurrent.futures.Future] = set()
    done = {path.name: path for path in children(plan.directory) if path.suffix == ".json"}
    with console.progress(f"Preparing {plan.corpus.title}") as report, _pool(processes) as pool:

        def collect(when):
            nonlocal waiting, characters
            finished, waiting = concurrent.futures.wait(waiting, return_when=when)
            characters += sum(future.result()["characters"] for future in finished)
            report(characters)

        for number, block in enumerate(blocks_of(plan.corpus.documents)):
            names.append(f"rows-{number:06d}")
            if (path := done.get(f"{names[-1]}.json")) is not None:
                characters += json.loads(path.read_text())["characters"]
                continue
            waiting.add(pool.submit(plan.write_block, names[-1], block))
            if len(waiting) > processes:
                collect(concurrent.futures.FIRST_COMPLETED)
        collect(concurrent.futures.ALL_COMPLETED)
    return names


def _pool(processes: int) -> concurrent.futures.ProcessPoolExecutor:
    """Worker processes; spawned, since JAX's threads do not survive a fork. Ctrl-C is the parent's to handle."""
    return concurrent.futures.ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
