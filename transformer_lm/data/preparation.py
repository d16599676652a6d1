"""Corpus -> tokenizer and packed token rows on disk: the order of work.

Whoever is interrupted goes on where it stopped, and ends with the same bytes. One machine does the work with processes
of its own. For many, the same functions are steps of a datatrove pipeline (`datatrove_steps.py`), which a
`launcher.Launcher` runs.
"""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Annotated

from absl import logging
from etils import epath

from transformer_lm import locks
from transformer_lm.data import cleaning, corpora, dataset_preprocessor, rows, tokenizer_training
from transformer_lm.data.corpora.base import Gone
from transformer_lm.data.dataset_preprocessor import Preprocessing, texts_of
from transformer_lm.data.launcher import Launcher
from transformer_lm.data.rows import Corpus, PreparedCorpus, PreparedMixture, PreparedRows, RowsPlan
from transformer_lm.data.workers import cores, make_blocks
from transformer_lm.errors import UserError
from transformer_lm.extras import optional_import
from transformer_lm.fields import Count, Range, RowLength, check
from transformer_lm.files import absolute, make_own_folder, write_atomically
from transformer_lm.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which corpus, which tokenizer, which rows; `configs/base.py` says what the fields mean."""

    dataset_name: str | list | tuple  # as `corpora.open_documents` takes it; or a mixture, [(name, weight), ...]
    train_split: str
    eval_dataset_name: str | list | tuple | None
    eval_split: str
    text_field: str
    conversations: bool
    streaming: bool
    preprocessor: str | None  # a key of `dataset_preprocessor.PREPROCESSORS`
    unicode_normalization: str
    cleaning_rules: str  # names of `cleaning.RULES` in order
    vocab_path: str | None
    vocab_size: Count
    max_corpus_chars: Annotated[int, Range(least=1, most=2**63 - 1)]
    spm_train_options: str
    max_target_length: RowLength
    max_eval_target_length: RowLength
    prepared_dir: str | None
    prepare_processes: Annotated[int, Range(least=0, most=4096)]  # 0 for one a core

    def __post_init__(self):
        check(self)
        cleaning.parse_rules(self.cleaning_rules)
        for name in ("preprocessor", "unicode_normalization", "cleaning_rules"):
            if self.conversations and getattr(self, name):
                raise UserError(f"{name}={getattr(self, name)!r} is for texts; leave it out with conversations=True.")
        if self.preprocessor == dataset_preprocessor.CONVERSATIONS:
            raise UserError(f"preprocessor={self.preprocessor!r}: set conversations=True in its place.")


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """All that training reads.

    Attributes:
      tokenizer: of all rows.
      train, eval: the rows.
      judged: conversations to evaluate on whose answers their source can judge; None where there are none.
    """

    tokenizer: Tokenizer
    train: PreparedRows
    eval: PreparedRows
    judged: corpora.Documents | None = None


def prepare(
    config: DataConfig,
    workdir: str,
    launcher: Launcher | None = None,
    tokenizer_source: epath.Path | None = None,
    kept: Collection[str] = (),
) -> PreparedData:
    """Makes what is missing of tokenizer, training rows and evaluation rows, and finds what is there.

    Args:
      config: what to prepare.
      workdir: the run's folder, local or remote.
      launcher: where datatrove's tasks do the work; None for processes of this machine, which need no datatrove
        unless there is something to clean.
      tokenizer_source: a tokenizer to take where there is none, rather than train one.
      kept: names of the rows that a run began with, which it keeps though their sources have changed since.

    Raises:
      UserError: a dataset or split does not exist (before any long work), or its content cannot be used.
    """
    root = _root(config, workdir)
    kept_rows = _found(root, kept)
    work = _Preparation(config, root, launcher, kept_rows)
    opened: dict[str, corpora.Source] = {}
    may_be_gone = bool(kept_rows)
    train = open_corpora(config.dataset_name, config.train_split, config, opened, may_be_gone)
    evaluation = _open_evaluation(config, opened, may_be_gone)
    spm_path = _spm_path(config, workdir)
    had_tokenizer = spm_path.exists()
    if tokenizer_source is None and not had_tokenizer:
        tokenizer_training.check_options(config.spm_train_options, config.vocab_size)  # before the corpus is read
    spm = _tokenizer(spm_path, tokenizer_source, lambda: list(map(work.cleaned, train)), config)
    train_parts = work.find(train, spm, config.max_target_length)
    eval_parts = work.find(evaluation, spm, config.max_eval_target_length)
    if any(isinstance(part, RowsPlan) for part in (*train_parts, *eval_parts)):
        if had_tokenizer and not config.vocab_path:
            logging.info("Rows are made with the tokenizer that is there, %s; remove it, or use another --workdir, for "
                         "one of this corpus and these options.", spm_path)  # fmt: skip
        _warn_of_overlaps(train, evaluation)  # which may read all documents
    rows_of_both = work.complete(train_parts, train), work.complete(eval_parts, evaluation)
    return PreparedData(spm, *rows_of_both, _judged(evaluation))


def _found(root: epath.Path, names: Collection[str]) -> tuple[PreparedCorpus, ...]:
    """Those of the named rows that are there."""
    return tuple(found for name in names if (found := PreparedCorpus.find(root / name)))


def rows_named(data: PreparedData) -> dict[str, list[str]]:
    """The names of the rows, by which `find_named` finds them."""
    return {"train": _names(data.train), "eval": _names(data.eval)}


def _names(rows_: PreparedRows) -> list[str]:
    return [part.directory.name for part in rows_.parts]


def find_named(config: DataConfig, workdir: str, names: dict[str, list[str]]) -> PreparedData:
    """What another process of the run has just prepared. No source is asked, whose answer may be another by now."""

    def read(dataset: str | list, names: list[str]) -> PreparedRows:
        parts = [PreparedCorpus.open(_root(config, workdir) / name) for name in names]
        return _mixed(parts, [weight for _, weight in _parts_of(dataset)])

    return PreparedData(
        Tokenizer.load(_spm_path(config, workdir)),
        read(config.dataset_name, names["train"]),
        read(config.eval_dataset_name or config.dataset_name, names["eval"]),
        _judged(_open_evaluation(config, may_be_gone=True) if config.conversations else []),
    )


def _judged(evaluation: list[Corpus]) -> corpora.Documents | None:
    """Conversations whose answers their source can judge, the first there are."""
    return next((corpus.documents for corpus in evaluation if corpus.documents.source.judges), None)


def _mixed(parts: Sequence[PreparedCorpus], weights: Sequence[float]) -> PreparedRows:
    """One corpus, or several as a mixture."""
    return parts[0] if len(parts) == 1 else PreparedMixture(tuple(parts), tuple(weights))


def prepare_evaluation(config: DataConfig, spm: Tokenizer, root: epath.Path) -> PreparedRows:
    """The evaluation rows of a recipe alone, for a tokenizer read from a file; found or made below `root`."""
    evaluation = _open_evaluation(config)
    work = _Preparation(config, root)
    return work.complete(work.find(evaluation, spm, config.max_eval_target_length), evaluation)


def find_evaluation(
    config: DataConfig, spm: Tokenizer, root: epath.Path, kept: Collection[str] = ()
) -> PreparedRows | None:
    """As `prepare_evaluation`, where all of it is there already; else None. Nothing is written.

    `kept` names rows that a run began with, which are taken where their source is gone.
    """
    evaluation = _open_evaluation(config, may_be_gone=bool(kept))
    is_gone = any(isinstance(corpus.documents.source, Gone) for corpus in evaluation)
    work = _Preparation(config, root, kept=_found(root, kept) if is_gone else (), makes=False)
    try:
        return work.complete(work.find(evaluation, spm, config.max_eval_target_length), evaluation)
    except _Missing:
        return None


class _Missing(Exception):  # noqa: N818  (no error)
    """Something would have to be made."""


def _root(config: DataConfig, workdir: str) -> epath.Path:
    """The folder below which everything is found or made."""
    return absolute(config.prepared_dir or epath.Path(workdir) / "prepared")


def _spm_path(config: DataConfig, workdir: str) -> epath.Path:
    return absolute(config.vocab_path or epath.Path(workdir) / "sentencepiece_model")


def _open_evaluation(config: DataConfig, opened: dict | None = None, may_be_gone: bool = False) -> list[Corpus]:
    """What a recipe evaluates on; an error names the field that has it."""

    def of_field(error: UserError) -> UserError:
        is_named = config.eval_dataset_name and str(error).startswith("dataset_name=")
        return UserError(f"eval_{error}") if is_named else error

    name = config.eval_dataset_name or config.dataset_name
    try:
        found = open_corpora(name, config.eval_split, config, opened, may_be_gone)
    except UserError as error:
        raise of_field(error) from error
    for source in (corpus.documents.source for corpus in found):
        if isinstance(source, Gone):
            source.error = of_field(source.error)
    return found


def _warn_of_overlaps(train: list[Corpus], evaluation: list[Corpus]):
    for one, other in itertools.product(train, evaluation):
        if one.documents.overlaps(other.documents):
            logging.warning("%s is evaluated on, and documents of it are trained on (%s): the scores will be too good.",
                            other.title, one.title)  # fmt: skip


def _tokenizer(
    path: epath.Path, source: epath.Path | None, train: Callable[[], list[Corpus]], config: DataConfig
) -> Tokenizer:
    """The tokenizer at a path, copied from a source or trained where there is none yet."""
    if not path.exists():
        with locks.waiting_for(f"{path}.lock", f"The tokenizer {path}"):
            if not path.exists():
                model = Tokenizer.load(source).model if source else _train_tokenizer(train(), config)
                write_atomically(path, model)
                logging.info("Wrote the tokenizer to %s.", path)
    try:
        spm = Tokenizer.load(path)
    except UserError as error:
        if config.vocab_path:
            raise
        raise UserError(f"{error} Delete it to train a new one.") from error
    if spm.vocab_size != config.vocab_size:
        logging.info("The tokenizer at %s has %d pieces; so has the model.", path, spm.vocab_size)
    return spm


def _train_tokenizer(train: list[Corpus], config: DataConfig) -> bytes:
    mixture = [(texts_of(corpus.documents, corpus.preprocessing), corpus.weight) for corpus in train]
    return tokenizer_training.train(mixture, config.vocab_size, config.max_corpus_chars, config.spm_train_options)


def _parts_of(name: str | list) -> list[tuple[str, float]]:
    """The names of a mixture or of one dataset with their weights, which sum to 1."""
    parts = [(name, 1.0)] if isinstance(name, str) else name
    try:
        parts = [(str(part), float(weight)) for part, weight in parts]
        total = sum(weight for _, weight in parts)
        if not parts or not total < float("inf") or not all(weight > 0 and weight / total > 0 for _, weight in parts):
            raise ValueError
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"dataset_name={name!r} must be a name or a list of (name, weight), weights above 0 whose sum is "
            "finite and shares of it are above 0."
        ) from error
    return [(part, weight / total) for part, weight in parts]


def open_corpora(
    name: str | list, split: str, config: DataConfig, opened: dict | None = None, may_be_gone: bool = False
) -> list[Corpus]:
    """The corpora of a dataset name or a mixture, their weights summing to 1.

    Args:
      name: what a recipe's dataset_name may be.
      split: of each.
      config: how they are read.
      opened: sources by name, which are shared.
      may_be_gone: whether a corpus whose source cannot be opened gets `Gone` for one.
    """
    options = corpora.Options(config.text_field, config.streaming, config.conversations)
    preprocessor = dataset_preprocessor.CONVERSATIONS if config.conversations else config.preprocessor

    def open_one(part: str, weight: float) -> Corpus:
        preprocessing = dataset_preprocessor.for_dataset(part, preprocessor, config.unicode_normalization)
        try:
            return Corpus.open(corpora.open_documents(part, split, options, opened), preprocessing, weight)
        except UserError as error:
            if not may_be_gone:
                raise
            return Corpus.open(corpora.gone_documents(part, split, error), preprocessing, weight)

    return [open_one(part, weight) for part, weight in _parts_of(name)]


@dataclasses.dataclass(frozen=True)
class _Preparation:
    """From corpora to rows.

    Attributes:
      config: what to prepare.
      root: the folder below which everything is found or made.
      launcher: see `prepare`.
      kept: rows that a run began with.
      makes: whether what is not there is made; if not, _Missing is raised.
    """

    config: DataConfig
    root: epath.Path
    launcher: Launcher | None = None
    kept: tuple[PreparedCorpus, ...] = ()
    makes: bool = True

    def cleaned(self, corpus: Corpus) -> Corpus:
        """The corpus as it is, or where the recipe has rules the texts that they keep, which are written to disk."""
        if not self.config.cleaning_rules:
            return corpus
        identity = self._identity(corpus)
        directory = self.root / f"cleaned-{rows.digest(identity)}"
        if (report := cleaning.find(directory)) is None:
            self._check_makes()
            with locks.waiting_for(f"{directory}.lock", f"The cleaned corpus {directory}"):
                report = cleaning.find(directory) or self._clean(corpus, directory)
        documents = cleaning.open_texts(directory / report["texts"])
        return Corpus(documents, Preprocessing(), identity | {"cleaning_counts": report["counts"]}, corpus.weight)

    def _clean(self, corpus: Corpus, directory: epath.Path) -> dict:
        launcher = self.launcher or cleaning.local_launcher(self.config.prepare_processes)
        rules = cleaning.parse_rules(self.config.cleaning_rules)
        return cleaning.clean(corpus.documents, corpus.preprocessing, rules, directory, launcher)

    def _identity(self, corpus: Corpus) -> dict:
        """All that determines the texts of a corpus when it is cleaned."""
        if not (rules := self.config.cleaning_rules):
            return corpus.identity
        return corpus.identity | {"cleaning_rules": rules, "cleaning_code": cleaning.fingerprint(rules)}

    def find(self, mixture: list[Corpus], spm: Tokenizer, row_length: int) -> list[PreparedCorpus | RowsPlan]:
        """The rows of each corpus where they are there, or else what is to be made."""
        return [self._find(corpus, spm, row_length) for corpus in mixture]

    def _find(self, corpus: Corpus, spm: Tokenizer, row_length: int) -> PreparedCorpus | RowsPlan:
        plan = RowsPlan(dataclasses.replace(corpus, identity=self._identity(corpus)), spm, row_length, self.root)
        source = corpus.documents.source
        gone = source.error if isinstance(source, Gone) else None
        for found in self.kept:
            differs = {field for field, value in plan.identity.items() if found.manifest.get(field) != value}
            if differs <= {"source_fingerprint"}:
                if gone:
                    logging.warning("The run goes on with the rows of %s that it has: %s", corpus.title, gone)
                elif differs:
                    logging.warning(
                        "%s is not what it was when this run began, which goes on with the rows that it has; use "
                        "another --workdir for what is there now.", corpus.title,
                    )  # fmt: skip
                return found
        if gone:
            self._check_makes()
            raise gone
        plan = dataclasses.replace(plan, corpus=self.cleaned(corpus))
        return PreparedCorpus.find(plan.directory) or plan

    def complete(self, parts: list[PreparedCorpus | RowsPlan], mixture: list[Corpus]) -> PreparedRows:
        """The rows of a corpus or a mixture, after those that are missing have been made."""
        made = [self._make(part) if isinstance(part, RowsPlan) else part for part in parts]
        return _mixed(made, [corpus.weight for corpus in mixture])

    def _make(self, plan: RowsPlan) -> PreparedCorpus:
        self._check_makes()
        with locks.waiting_for(f"{plan.directory}.lock", f"The folder of rows {plan.directory}"):
            found = PreparedCorpus.find(plan.directory)
            return found or prepare_rows(plan, self.config.prepare_processes, self.launcher)

    def _check_makes(self):
        if not self.makes:
            raise _Missing


def prepare_rows(plan: RowsPlan, processes: int = 0, launcher: Launcher | None = None) -> PreparedCorpus:
    """Tokenizes and packs documents into rows, with processes of this machine (0: one a core) or by a launcher."""
    make_own_folder(plan.directory)
    if (plan.directory / rows.MANIFEST).exists():
        logging.warning("%s: something is damaged, and is made again.", plan.directory)
    if launcher is None:
        return rows.finish_rows(plan, make_blocks(plan, processes or cores()))
    optional_import("datatrove", "prep", f"--executor={launcher.executor}")
    from transformer_lm.data import datatrove_steps as steps

    return rows.finish_rows(plan, steps.make_blocks(plan, launcher))
