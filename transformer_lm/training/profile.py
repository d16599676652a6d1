"""A trace of some steps, for TensorBoard's profiler and Perfetto."""

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from etils import epath

from transformer_lm.errors import UserError

PROFILE_DIR = "plugins/profile"  # where TensorBoard finds it


def parse_span(text: str | None) -> tuple[int, int] | None:
    """The steps of --profile=START:STOP; None for none. Raises UserError for anything else."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise UserError(f"--profile={text} must be START:STOP, numbers of steps like 10:15.")
    return int(found[1]), int(found[2])


class Profile:
    """Writes the trace of the steps of a span into the workdir."""

    def __init__(self, workdir: os.PathLike | str, span: tuple[int, int] | None):
        self._folder = epath.Path(workdir)
        self._start, self._stop = span or (-1, -1)
        self._running = False

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around the step that follows so many steps, which the trace names: begins when it is the span's first."""
        if step == self._start:
            jax.profiler.start_trace(os.fspath(self._folder))
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def after(self, step: int, results: Any):
        """After so many steps: ends, with the devices done, when the span is over."""
        if self._running and step >= self._stop:
            jax.block_until_ready(results)
            self.close()

    def close(self):
        """Ends what is running: a run may end before its span does."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            logging.info("A trace from step %d on is in %s.", self._start, self._folder / PROFILE_DIR)
