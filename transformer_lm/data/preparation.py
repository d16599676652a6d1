"""Corpus -> tokenizer and packed token rows on disk: the order of work.

Whoever is interrupted goes on where it stopped, and ends with the same bytes. One machine does the work with processes
of its own. For many, the same functions are steps of a datatrove pipeline (`datatrove_steps.py`), which a
`launcher.Launcher` runs.
"""

import concurrent.futures.process
import dataclasses
import functools
import itertools
import os
from typing import Annotated

from absl import logging
from etils import epath

from transformer_lm import locks
from transformer_lm.data import cleaning, corpora, dataset_preprocessor, tokenizer_training
from transformer_lm.data.dataset_preprocessor import Preprocessing
from transformer_lm.data.launcher import Launcher
from transformer_lm.data.rows import (
    MANIFEST,
    Corpus,
    PreparedCorpus,
    PreparedMixture,
    RowsPlan,
    digest,
    finish_rows,
    read_block,
)
from transformer_lm.data.workers import make_blocks
from transformer_lm.errors import UserError
from transformer_lm.extras import optional_import
from transformer_lm.fields import Count, Range, RowLength, check
from transformer_lm.files import absolute, children, read_json, write_atomically
from transformer_lm.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which corpus, which tokenizer, which rows; `configs/base.py` says what the fields mean."""

    dataset_name: str | list | tuple  # as `corpora.open_documents` takes it; or a mixture, [(name, weight), ...]
    train_split: str
    eval_dataset_name: str | list | tuple | None
    eval_split: str
    text_field: str
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

    @property
    def options(self) -> corpora.Options:
        """How sources are read."""
        return corpora.Options(self.text_field, self.streaming)


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """All that training reads."""

    tokenizer: Tokenizer
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
    opened: dict[str, corpora.Source] = {}
    train = open_corpora(config.dataset_name, config.train_split, config, opened)
    evaluation = open_corpora(config.eval_dataset_name or config.dataset_name, config.eval_split, config, opened)
    _warn_of_overlaps(train, evaluation)
    spm_path = absolute(config.vocab_path or epath.Path(workdir) / "sentencepiece_model")
    if tokenizer_source is None and not spm_path.exists():
        tokenizer_training.check_options(config.spm_train_options)  # before the corpus is read
    train, evaluation = (_cleaned(part, config, root, launcher) for part in (train, evaluation))
    spm = _tokenizer(spm_path, tokenizer_source, train, config)
    rows = functools.partial(_rows_of, config=config, spm=spm, root=root, launcher=launcher)
    return PreparedData(
        spm,
        rows(train, row_length=config.max_target_length),
        rows(evaluation, row_length=config.max_eval_target_length),
    )


def _warn_of_overlaps(train: list[Corpus], evaluation: list[Corpus]):
    for one, other in itertools.product(train, evaluation):
        if one.documents.overlaps(other.documents):
            logging.warning("%s is evaluated on, and documents of it are trained on (%s): the scores will be too good.",
                            other.title, one.title)  # fmt: skip


def _tokenizer(path: epath.Path, source: epath.Path | None, train: list[Corpus], config: DataConfig) -> Tokenizer:
    """The tokenizer at a path, copied from a source or trained where there is none yet."""
    if not path.exists():
        with locks.waiting_for(f"{path}.lock", f"The tokenizer {path}"):
            if source and not path.exists():
                write_atomically(path, Tokenizer.load(source).model)
            elif not path.exists():
                mixture = [(corpus.texts(), corpus.weight) for corpus in train]
                model = tokenizer_training.train(
                    mixture,
                    vocab_size=config.vocab_size,
                    max_corpus_chars=config.max_corpus_chars,
                    options=config.spm_train_options,
                )
                write_atomically(path, model)
                logging.info("Wrote the tokenizer to %s.", path)
    spm = Tokenizer.load(path)
    if spm.vocab_size != config.vocab_size:
        logging.info("The tokenizer at %s has %d pieces; so has the model.", path, spm.vocab_size)
    return spm


def prepare_evaluation(config: DataConfig, spm: Tokenizer, root: epath.Path) -> PreparedCorpus | PreparedMixture:
    """The evaluation rows of a recipe alone, for a tokenizer read from a file; found or made below `root`."""
    evaluation = open_corpora(config.eval_dataset_name or config.dataset_name, config.eval_split, config)
    evaluation = _cleaned(evaluation, config, root, None)
    return _rows_of(evaluation, config.max_eval_target_length, config, spm, root, None)


def _rows_of(
    mixture: list[Corpus],
    row_length: int,
    config: DataConfig,
    spm: Tokenizer,
    root: epath.Path,
    launcher: Launcher | None,
) -> PreparedCorpus | PreparedMixture:
    """The rows of a corpus or a mixture, found or made."""
    parts = []
    for corpus in mixture:
        plan = RowsPlan(corpus, spm, row_length, root)
        if (found := _found_rows(plan)) is None:
            with locks.waiting_for(f"{plan.directory}.lock", f"The folder of rows {plan.directory}"):
                found = _found_rows(plan) or prepare_rows(plan, config.prepare_processes, launcher)
        parts.append(found)
    return parts[0] if len(parts) == 1 else PreparedMixture(tuple(parts), tuple(part.weight for part in mixture))


def _found_rows(plan: RowsPlan) -> PreparedCorpus | None:
    """The rows of a plan where they are there and whole, else None."""
    try:
        found = PreparedCorpus.load(plan.directory)
        return None if found.damaged_blocks() else found
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):  # a manifest that is cut or empty
        return None


def open_corpora(
    name: str | list, split: str, config: DataConfig, opened: dict[str, corpora.Source] | None = None
) -> list[Corpus]:
    """The corpora of a dataset name or a mixture, their weights summing to 1; sources in `opened` are shared."""
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
            corpora.open_documents(part, split, config.options, opened),
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
    directory = root / f"cleaned-{digest(identity)}"
    if not (directory / cleaning.REPORT).exists():
        with locks.waiting_for(f"{directory}.lock", f"The cleaned corpus {directory}"):
            rules = cleaning.parse_rules(config.cleaning_rules)
            if not (directory / cleaning.REPORT).exists():
                cleaning.clean(corpus.documents, corpus.preprocessing, rules, directory, launcher)
    report = read_json(directory / cleaning.REPORT)
    documents = cleaning.open_texts(directory / report["texts"])
    return Corpus(documents, Preprocessing(), identity | {"cleaning_counts": report["counts"]}, corpus.weight)


def prepare_rows(plan: RowsPlan, processes: int = 0, launcher: Launcher | None = None) -> PreparedCorpus:
    """Tokenizes and packs documents into rows, with processes of this machine (0: one a core) or by a launcher."""
    plan.directory.mkdir(parents=True, exist_ok=True)
    if (plan.directory / MANIFEST).exists():
        logging.warning("%s: something is damaged, and is made again.", plan.directory)
    if launcher is None:
        try:
            return finish_rows(plan, make_blocks(plan, processes or os.cpu_count() or 1))
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
    prefix = steps.rows_prefix(launcher.tasks)
    named = [path.stem for path in children(plan.directory) if path.match(f"{prefix}*.json")]
    if not all(read_block(plan.directory, name) for name in named) and logs.exists():
        logs.rmtree()  # a task that is marked as done is done again; its whole blocks are left as they are
    launcher.run("pack", [steps.ReadDocuments(documents), steps.PackRows(plan)], logs)
    return finish_rows(plan, sorted(path.stem for path in children(plan.directory) if path.match(f"{prefix}*.json")))
