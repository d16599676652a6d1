"""Orbax's checkpoints of a run: save, restore.

A workdir holds checkpoints/STEP/ with three items: params (all that generation needs), opt_state, and progress (step
and running totals).
"""

import os
import shutil
from typing import Any

import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint import checkpoint_managers

from transformer_lm.checkpoints.workdir import CHECKPOINTS_DIR, DAMAGED_DIR
from transformer_lm.errors import UserError
from transformer_lm.files import absolute


class Checkpoints:
    """The checkpoints of a workdir: atomic, written in the background, the latest `keep` retained."""

    def __init__(self, workdir: os.PathLike | str, keep: int = 1):
        self._directory = epath.Path(workdir) / CHECKPOINTS_DIR
        self._manager = ocp.CheckpointManager(
            absolute(self._directory),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.LatestN(keep), cleanup_tmp_directories=True
            ),
            item_names=("params", "opt_state", "progress"),
        )

    @property
    def steps(self) -> list[int]:
        """The steps that are there, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, params: Any, opt_state: Any, progress: Any):
        """Copies the arrays, then writes them in the background. Waits for an unfinished save before.

        Raises:
          UserError: this save, or the one before, failed (a full disk, say). Earlier checkpoints are as they were.
        """
        with _explained(self._directory):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params),
                    opt_state=ocp.args.StandardSave(opt_state),
                    progress=ocp.args.StandardSave(progress),
                ),
                force=True,
            )

    def wait(self):
        """Returns when nothing is being written any more; raises UserError as `save` does."""
        with _explained(self._directory):
            self._manager.wait_until_finished()

    def restore(self, params: Any, opt_state: Any, progress: Any) -> tuple[Any, Any, Any] | None:
        """The newest checkpoint that can be read, or None where there is none at all.

        A damaged one is reported, set aside in workdir/damaged_checkpoints, and the one before it is used.

        Args:
          params, opt_state, progress: trees of `jax.ShapeDtypeStruct` with shardings, which the result takes.

        Raises:
          UserError: there are checkpoints, and none of them can be read.
        """
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(params),
            opt_state=ocp.args.StandardRestore(opt_state),
            progress=ocp.args.StandardRestore(progress),
        )
        steps = self.steps[::-1]
        for step in steps:
            try:
                restored = self._manager.restore(step, args=args)
            except Exception as error:  # whatever a damaged file makes Orbax raise
                aside = self._directory.parent / DAMAGED_DIR / str(step)
                logging.error("Checkpoint %d is damaged (%s); moved to %s.", step, first_line(error), aside)
                aside.parent.mkdir(parents=True, exist_ok=True)
                if aside.exists():
                    aside.rmtree()
                (self._directory / str(step)).rename(aside)
                self._manager.reload()
                continue
            return restored["params"], restored["opt_state"], restored["progress"]
        if steps:
            raise UserError(
                f"None of the checkpoints {steps} in {self._directory} can be read; they were moved to {DAMAGED_DIR}/. "
                "Start again without them to train from the beginning."
            )
        return None

    def close(self):
        """Waits for the last save and lets go of the folder."""
        self.wait()
        self._manager.close()


class _explained:  # noqa: N801  (a context manager, named like a function)
    """Turns a failed write into a UserError."""

    def __init__(self, directory):
        self._directory = directory

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is not None and isinstance(error, Exception):
            free = shutil.disk_usage(self._directory).free / 2**20 if os.path.isdir(self._directory) else float("nan")
            raise UserError(
                f"A checkpoint could not be written to {self._directory} ({first_line(error)}; {free:.0f} MiB free). "
                "Earlier checkpoints are unharmed: make room and run the same command again."
            ) from error


def first_line(error: BaseException) -> str:
    """What an error of a library says, in a line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
