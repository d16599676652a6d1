"""TensorBoard's event file, written when the caller flushes it: a full disk is the caller's error, and no thread's.

tensorboardX makes the records; its SummaryWriter would write them in a thread, which dies of a full disk unnoticed.
To an object store they go by the same way as all other files of a run.
"""

import os
import sys
import time
import types
import uuid
from collections.abc import Mapping
from typing import Any

# What tensorboardX would import where it is installed, which takes a while, for nothing used here.
_HIDDEN = [name for name in ("torch", "boto3", "google.cloud.storage") if name not in sys.modules]
sys.modules.update(dict.fromkeys(_HIDDEN))

from tensorboardX import record_writer, summary  # noqa: E402
from tensorboardX.event_file_writer import EventsWriter  # noqa: E402
from tensorboardX.proto.event_pb2 import Event, SessionLog  # noqa: E402
from tensorboardX.proto.summary_pb2 import Summary  # noqa: E402

for _name in _HIDDEN:
    del sys.modules[_name]

from transformer_lm.files import is_remote, write_atomically  # noqa: E402

HPARAM_METRICS = {"eval/loss": 0.0, "eval/bits_per_char": 0.0}  # what the HParams tab compares runs by


class Board:
    """An event file of a run."""

    def __init__(self, folder: os.PathLike | str, start_step: int):
        """Begins a file; of earlier files TensorBoard shows the steps up to `start_step` alone."""
        place, suffix = os.path.join(os.fspath(folder), "events"), f".{uuid.uuid4().hex[:8]}"
        if is_remote(place):
            record_writer.register_writer_factory(place.partition(":")[0], types.SimpleNamespace(open=_WholeFile))
        self._writer = EventsWriter(place, suffix)
        if start_step:
            self._write(Event(session_log=SessionLog(status=SessionLog.START)), start_step + 1)

    def add_scalars(self, step: int, values: Mapping[str, float]):
        """Adds values by their tags, like "train/loss"."""
        self._add(step, *(summary.scalar(tag, value) for tag, value in values.items()))

    def add_text(self, step: int, tag: str, text: str):
        """Adds a text as it is: indented, so that Markdown leaves its marks alone."""
        self._add(step, summary.text(tag, "\n".join(f"    {line}" for line in _text(text).split("\n"))))

    def add_hyperparameters(self, fields: Mapping[str, Any]):
        """Adds the run to the HParams tab."""
        shown = {
            name: value if isinstance(value, bool | int | float) else _text(value) for name, value in fields.items()
        }
        self._add(0, *summary.hparams(shown, HPARAM_METRICS))

    def _add(self, step: int, *contents: Summary):
        for content in contents:
            self._write(Event(summary=content), step)

    def _write(self, event: Event, step: int):
        event.wall_time, event.step = time.time(), step
        self._writer.write_event(event)

    def flush(self):
        """Writes what was added, to an object store the whole file anew."""
        self._writer.flush()

    def close(self):
        """Closes the file."""
        self._writer.close()


class _WholeFile:
    """A file of an object store, which takes whole files alone."""

    def __init__(self, path: str):
        self._path, self._content = path, bytearray()

    def write(self, content: bytes):
        """Adds to the file, which is not written yet."""
        self._content += content

    def flush(self):
        """Writes all of it."""
        write_atomically(self._path, bytes(self._content))

    close = flush


def _text(value: Any) -> str:
    """What a value is written as; half a surrogate pair, which UTF-8 cannot hold, is escaped."""
    return str(value).encode(errors="backslashreplace").decode()
