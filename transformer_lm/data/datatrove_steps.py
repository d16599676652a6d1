"""This package's functions as steps of datatrove pipelines. Needs the extra `prep`; imported where it is used."""

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import hojichar
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.word_tokenizers import WordTokenizer
from etils import epath

from transformer_lm.data import corpora, dataset_preprocessor
from transformer_lm.data.dataset_preprocessor import Preprocessing
from transformer_lm.data.launcher import Launcher
from transformer_lm.data.rows import RowsPlan, blocks_of, read_block
from transformer_lm.errors import UserError
from transformer_lm.files import allow_open_files, appears, children, write_atomically

EXAMPLES = 3  # removed texts that each task keeps of each rule, for the report
EXAMPLE_CHARS = 200
PATIENCE_SECONDS = 120  # until this machine sees what another one has written


class ReadDocuments(PipelineStep):
    """Reads a task's share of a corpus's documents."""

    def __init__(self, documents: corpora.Documents, name: str = "documents"):
        super().__init__()
        named(name, self)
        self.documents = documents

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """See PipelineStep."""
        for number, document in enumerate(self.documents.read(rank, world_size)):
            self.stat_update("documents")
            yield Document(text=document, id=f"{rank}/{number}")


class ToTexts(PipelineStep):
    """From documents to the texts in them."""

    def __init__(self, preprocessing: Preprocessing):
        super().__init__()
        named("texts", self)
        self.preprocessing = preprocessing

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """See PipelineStep."""
        for document in data:
            for name, count in dataset_preprocessor.without_impossible_characters(document.text)[1].items():
                self.stat_update(name, value=count)
            for number, text in enumerate(self.preprocessing(document.text)):
                self.stat_update("texts")
                yield Document(text=text, id=f"{document.id}/{number}")


def pack_rows(directory: str, write_block: Callable, data: Iterable[Document], rank: int, world_size: int):
    """Tokenizes and packs a task's documents, block by block; blocks that are there already are left as they are.

    At last it writes how many they are, since a listing of the folder, which another machine may have cached, need not
    have them all.
    """
    folder, count = epath.Path(directory), 0
    for block in blocks_of(document.text for document in data):
        name = _block_name(world_size, rank, count)
        if read_block(folder, name) is None:
            write_block(name, block)
        count += 1
    write_atomically(_count_file(folder, world_size, rank), str(count).encode())


def make_blocks(plan: RowsPlan, launcher: Launcher) -> list[str]:
    """Has a launcher's tasks do the blocks of rows that are not done yet; returns the names of all, in order."""
    documents, logs = plan.corpus.documents, plan.directory / f"logs-{launcher.tasks}"
    documents.count()  # once here, not in every task

    def names(rank: int) -> list[str]:
        count = int(_count_file(plan.directory, launcher.tasks, rank).read_text())
        return [_block_name(launcher.tasks, rank, number) for number in range(count)]

    def is_whole(rank: int) -> bool:
        with contextlib.suppress(FileNotFoundError, ValueError):
            return all(read_block(plan.directory, name) for name in names(rank))
        return False

    marks = [mark.name for mark in children(logs / "completions") if mark.name.isdigit()]
    if not all(is_whole(int(mark)) for mark in marks):
        logs.rmtree()  # a task that is marked as done is done again; its whole blocks are left as they are
    pack = functools.partial(pack_rows, str(plan.directory), plan.write_block)
    launcher.run("pack", [ReadDocuments(documents), pack], logs)
    for rank in range(launcher.tasks):
        if not appears(file := _count_file(plan.directory, launcher.tasks, rank), PATIENCE_SECONDS):
            raise UserError(
                f"{file} was written by a task, but is not to be seen here: the folder has to be on a file system or "
                "in a bucket that all machines share. The same command goes on from what is there."
            )
    return [name for rank in range(launcher.tasks) for name in names(rank)]


def _block_name(tasks: int, rank: int, number: int) -> str:
    return f"rows-{tasks:05d}-{rank:05d}-{number:06d}"


def _count_file(folder: epath.Path, tasks: int, rank: int) -> epath.Path:
    """Holds how many blocks a task has made."""
    return folder / f"rows-{tasks:05d}-{rank:05d}.count"


def opening_many_files(data: Any, rank: int, world_size: int) -> Any:
    """A step that lets its process have as many files open as there are tasks."""
    del rank, world_size
    allow_open_files()
    return data


def kept_by(filters: list[hojichar.Filter], document: Document) -> bool:
    """Whether all of some HojiChar filters keep a text."""
    return not any(one.apply(hojichar.Document(document.text)).is_rejected for one in filters)


def named(name: str, step: PipelineStep) -> PipelineStep:
    """The step, with its counts under a name of our own."""
    step.name = step.stats.name = name
    step.type = step.type or "STEP"
    return step


class KeepExamples:
    """Takes the texts that a rule removes, and writes the first few of a task down."""

    def __init__(self, folder: epath.Path, rule: str):
        self.folder, self.rule = str(folder), rule
        self.rank, self.texts = 0, []

    def __enter__(self):
        self.texts = []
        return self

    def write(self, document: Document, rank: int = 0):
        """Called for every removed text."""
        self.rank = rank
        if len(self.texts) < EXAMPLES:
            self.texts.append(document.text[:EXAMPLE_CHARS])

    def __exit__(self, kind, error, traceback):
        if self.texts and error is None:
            path = epath.Path(self.folder) / f"{self.rule}-{self.rank:05d}.json"
            write_atomically(path, json.dumps(self.texts).encode())


class Characters(WordTokenizer):
    """Takes characters for words, so that n-grams need no morphological analysis."""

    def word_tokenize(self, text: str) -> list[str]:
        """The characters but white space."""
        return [character for character in text if not character.isspace()]

    def sent_tokenize(self, text: str) -> list[str]:
        """The text as one sentence."""
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """The spans of `sent_tokenize`."""
        return [(0, len(text))]
