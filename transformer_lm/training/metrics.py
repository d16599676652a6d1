"""One writer for what a run reports: the console, TensorBoard, metrics.jsonl."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from absl import logging
from etils import epath

from transformer_lm.checkpoints.workdir import METRICS_FILE
from transformer_lm.errors import UserError
from transformer_lm.files import is_remote, read_json_lines, write_atomically
from transformer_lm.training.board import Board

REMOTE_SECONDS = 60  # at least, between two times that the files of an object store are written for a log line


class MetricWriter:
    """Writes a run's events; a step that is done again after a restart stands there once.

    An object store takes whole files alone, so that there they are written seldom, and always by `sync` and `close`.
    """

    def __init__(self, workdir: os.PathLike | str, start_step: int, report: Callable[[int, str], None]):
        """Drops what an interrupted run wrote after `start_step`; `report` shows a step and a text on the console."""
        self._report = report
        self._path = epath.Path(workdir) / METRICS_FILE
        self._file = None
        with self._explained():
            self._lines = _lines_until(self._path, start_step)
            write_atomically(self._path, "".join(self._lines).encode())
            self._file = None if is_remote(workdir) else self._path.open("a", encoding="utf-8")
            self._board = Board(workdir, start_step)
            self._stored_at = time.monotonic()

    def write(self, step: int, values: Mapping[str, float]):
        """Adds one line to metrics.jsonl and the values to TensorBoard, and logs them."""
        line = json.dumps({"step": step, **_finite(values)}) + "\n"
        with self._explained():
            self._lines.append(line)
            if self._file:
                self._file.write(line)
            self._board.add_scalars(step, {_tag(name): value for name, value in values.items()})
            self._flush(time.monotonic() - self._stored_at > REMOTE_SECONDS)
        text = " ".join(f"{name.removeprefix('train_')} {_brief(value)}" for name, value in values.items())
        logging.info("step %d: %s", step, text)

    def write_samples(self, step: int, texts: list[str]):
        """Adds generated texts to TensorBoard and logs them."""
        with self._explained():
            self._board.add_text(step, "samples", "\n\n".join(texts))
            self._flush()
        for text in texts:
            logging.info("Sample: %s", text)

    def write_recipe(self, fields: Mapping):
        """Adds the hyperparameters to TensorBoard."""
        with self._explained():
            self._board.add_text(0, "recipe", "\n".join(f"{name} = {value!r}" for name, value in fields.items()))
            self._board.add_hyperparameters(fields)
            self._flush()

    def has(self, step: int, name: str) -> bool:
        """Whether a metric of a step stands there."""
        return any(values["step"] == step and name in values for values in map(json.loads, self._lines[-10:]))

    def show(self, step: int, text: str):
        """Moves the progress bar."""
        self._report(step, text)

    def sync(self):
        """Returns when what was written survives a power cut; before a checkpoint that counts on it."""
        with self._explained():
            self._flush(is_due=True)
            if self._file:
                os.fsync(self._file.fileno())

    def _flush(self, is_due: bool = False):
        """Writes what was added: to files at once, to an object store when it is due."""
        if self._file:
            self._file.flush()
            self._board.flush()
        elif is_due:
            write_atomically(self._path, "".join(self._lines).encode())
            self._board.flush()
            self._stored_at = time.monotonic()

    def close(self):
        """Closes the files."""
        with self._explained():
            self._flush(is_due=True)
            if self._file:
                self._file.close()
            self._board.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self._file is not None and not isinstance(error, OSError):  # of an object store's library anything
                raise
            raise UserError(
                f"The run's metrics could not be written to {self._path.parent}: {error}. Checkpoints are unharmed: "
                "mend the cause and run the same command again."
            ) from error


class SilentWriter:
    """Stands in for the writer where another process of the run writes."""

    def __init__(self, workdir: os.PathLike | str, start_step: int):
        self._lines = _lines_until(epath.Path(workdir) / METRICS_FILE, start_step)

    has = MetricWriter.has

    def _pass(self, *_: Any):
        """Writes nothing."""

    write = write_samples = write_recipe = show = sync = close = _pass


def read_last(workdir: os.PathLike | str, name: str) -> float:
    """The last value of a metric in a workdir's metrics.jsonl; raises UserError where there is none yet."""
    records = read_json_lines(epath.Path(workdir) / METRICS_FILE)
    found = [values[name] for values in records if name in values]
    if not found:
        raise UserError(f"{workdir} has no {name} yet: its run was stopped before.")
    return found[-1]


def _lines_until(path: epath.Path, step: int) -> list[str]:
    """The whole lines up to a step."""
    kept = []
    content = path.read_bytes().decode("utf-8", errors="replace") if path.exists() else ""
    for line in content.splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # a line that was being written when the run was killed
    return kept


def _tag(name: str) -> str:
    """A metric's name in TensorBoard, which groups by what stands before the slash: train_loss -> train/loss."""
    for group in ("train_", "eval_"):
        if name.startswith(group):
            return name.replace("_", "/", 1)
    return f"eval/{name}" if name == "instruction_accuracy" else f"train/{name}"


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no infinity: a perplexity that overflows is null."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _brief(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
