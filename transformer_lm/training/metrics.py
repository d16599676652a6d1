"""One writer for what a run reports: the console, TensorBoard, metrics.jsonl."""

import json
import os
from collections.abc import Callable, Mapping

from absl import logging
from etils import epath
from tensorboardX import SummaryWriter

from transformer_lm.checkpoints.workdir import METRICS_FILE
from transformer_lm.files import is_remote, write_atomically


class MetricWriter:
    """Writes a run's events; a step that is done again after a restart stands there once."""

    def __init__(self, workdir: os.PathLike | str, start_step: int, report: Callable[[int, str], None]):
        """Drops what an interrupted run wrote after `start_step`; `report` shows a step and a text on the console."""
        self._report = report
        self._path = epath.Path(workdir) / METRICS_FILE
        self._lines = _lines_until(self._path, start_step)
        write_atomically(self._path, "".join(self._lines).encode())
        self._file = None if is_remote(workdir) else self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(os.fspath(workdir), purge_step=start_step + 1 if start_step else None)

    def write(self, step: int, values: Mapping[str, float]):
        """Adds one line to metrics.jsonl and the values to TensorBoard, and logs them."""
        line = json.dumps({"step": step, **values}) + "\n"
        if self._file:
            self._file.write(line)
            self._file.flush()
        else:  # an object store cannot append
            self._lines.append(line)
            write_atomically(self._path, "".join(self._lines).encode())
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()
        text = " ".join(f"{name.removeprefix('train_')} {_brief(value)}" for name, value in values.items())
        logging.info("step %d: %s", step, text)

    def write_samples(self, step: int, texts: list[str]):
        """Adds generated texts to TensorBoard and logs them."""
        self._board.add_text("samples", "\n\n".join(texts), step)
        for text in texts:
            logging.info("Sample: %s", text)

    def write_recipe(self, fields: Mapping):
        """Adds the hyperparameters to TensorBoard."""
        text = "\n".join(f"    {name} = {value!r}" for name, value in fields.items())
        self._board.add_text("recipe", text, 0)

    def show(self, step: int, text: str):
        """Moves the progress bar."""
        self._report(step, text)

    def close(self):
        """Flushes everything."""
        if self._file:
            self._file.close()
        self._board.close()


def read_last(workdir: os.PathLike | str, name: str) -> float:
    """The last value of a metric in a workdir's metrics.jsonl."""
    lines = (epath.Path(workdir) / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return [values[name] for values in map(json.loads, lines) if name in values][-1]


def _lines_until(path: epath.Path, step: int) -> list[str]:
    """The whole lines up to a step."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # a line that was being written when the run was killed
    return kept


def _brief(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
