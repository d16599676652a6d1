"""Orbax's checkpoints of a run: save, read back, restore.

A workdir holds checkpoints/STEP/ with three items: params (all that generation needs), opt_state, and progress (step,
rows read, running totals). A checkpoint counts when it can be read back; none is moved or deleted because something
else is wrong, such as a permission, memory, a network, or another recipe.
"""

import os
import re
import tempfile
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from transformer_lm.checkpoints.workdir import CHECKPOINTS_DIR, DAMAGED_DIR
from transformer_lm.errors import UserError
from transformer_lm.files import absolute, children, is_remote

SAVE_SECONDS = 24 * 3600  # that a save may take in the background: slow storage is no error
SHARED_FROM_BYTES = 1 << 20  # of a device's share, from which on devices with copies of an array share its saving
ITEMS = ("params", "opt_state", "progress")
MISLEADING = re.compile(r"[*?\[\]\\\ud800-\udfff]")  # in paths: patterns to Orbax, slashes or nothing to TensorStore
# What the libraries say when the files are not to blame. They tell by words alone.
NOT_DAMAGE = re.compile(
    r"permission|not permitted|denied|memory|bad_alloc|RESOURCE_EXHAUSTED|can't start new thread|too many open files"
    r"|UNAVAILABLE|DEADLINE|timed? ?out|UNAUTHENTICATED|connection|input/output error|stale file handle",
    re.IGNORECASE,
)
# What names files in an error, as far as it can be told.
PATHS = re.compile(r"""\[tensorstore_spec=.*|"[^"]*"|'/[^']*'|\S*/\S*/\S*""", re.DOTALL)
REMOTE_DAMAGE = re.compile(r"DATA_LOSS|OUT_OF_RANGE|NOT_FOUND|FileNotFound|JSON|no attribute")


class Checkpoints:
    """The checkpoints of a workdir: atomic, written in the background, the latest `keep` retained."""

    def __init__(self, workdir: os.PathLike | str, keep: int = 1, *, read_only: bool = False):
        """With `read_only` nothing is made or cleaned up."""
        self._workdir = absolute(workdir)
        self._directory = self._workdir / CHECKPOINTS_DIR  # for messages and for our own work
        self._alias = _alias(self._workdir)
        options = {"read_only": True, "create": False} if read_only else {"cleanup_tmp_directories": True}
        self._manager = ocp.CheckpointManager(
            epath.Path(self._alias.name) / "workdir" / CHECKPOINTS_DIR if self._alias else self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.LatestN(keep),
                async_options=ocp.options.AsyncOptions(timeout_secs=SAVE_SECONDS),
                **options,
            ),
            item_handlers={name: _handler() for name in ITEMS},
        )
        self._unread: int | None = None  # the step that was saved last, until it has been read back

    @property
    def steps(self) -> list[int]:
        """The steps that are there, oldest first."""
        return sorted(self._manager.all_steps())

    @property
    def set_aside(self) -> list[str]:
        """Names of the damaged checkpoints that were set aside."""
        return sorted(child.name for child in children(self._workdir / DAMAGED_DIR))

    def save(self, step: int, params: Any, opt_state: Any, progress: Any):
        """Copies the arrays, then writes them in the background. Waits for an unfinished save before.

        Raises:
          UserError: this save, or the one before, failed (a full disk, say). Earlier checkpoints are as they were.
        """
        self.wait()
        trees = dict(zip(ITEMS, (params, opt_state, progress), strict=True))
        try:
            args = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)
        except Exception as error:
            raise self._not_written(error) from error
        self._unread = step

    def wait(self):
        """Returns when nothing is being written any more and what was written can be read; raises as `save` does."""
        step, self._unread = self._unread, None
        try:
            self._manager.wait_until_finished()
            if step is not None:
                self._stored_shapes(step, ITEMS)
        except Exception as error:
            raise self._not_written(error) from error

    def _not_written(self, error: Exception) -> UserError:
        return UserError(
            f"A checkpoint could not be written to {self._directory}: {first_line(error)}. Earlier checkpoints are "
            "unharmed: mend the cause and run the same command again."
        )

    def restore(self, params: Any, opt_state: Any, progress: Any) -> tuple[Any, Any, Any] | None:
        """The newest checkpoint that can be read, or None where there is none at all.

        One that cannot be read, though its files can, while an earlier one can be, is damaged: it is reported and set
        aside in workdir/damaged_checkpoints.

        Args:
          params, opt_state, progress: trees of `jax.ShapeDtypeStruct` with shardings, which the result takes. What
            `progress` asks for and the checkpoint lacks is left out of the result.

        Raises:
          UserError: there are checkpoints, and none of them can be read, or they are of another network or optimizer;
            or there are none but such as were set aside.
        """
        failures: dict[int, str] = {}
        for step in self.steps[::-1]:
            restored, cause, outcome = None, None, _READ
            try:
                restored = self._restore(step, dict(zip(ITEMS, (params, opt_state, progress), strict=True)))
            except UserError:
                raise
            except Exception as error:  # whatever a damaged file makes Orbax raise
                cause, outcome = error, _DAMAGED if self._is_damage(step, error) else _HIDDEN
            outcome = _worst(outcome)
            why = first_line(cause) if cause else "as another process of this run says"
            if outcome == _HIDDEN:
                raise UserError(
                    f"Checkpoint {step} in {self._directory} cannot be read now: {why}. It is left as it is; see to "
                    "memory, permissions and the network, and run the same command again."
                ) from cause
            if outcome == _READ:
                self._set_aside(list(failures))
                return restored
            logging.error("Checkpoint %d cannot be read (%s).", step, why)
            failures[step] = why
        if failures:
            raise UserError(
                f"None of the checkpoints {sorted(failures)} in {self._directory} can be read "
                f"({failures[max(failures)]}); they are left as they are. Bring back a copy, or use "
                "another --workdir to train from the beginning."
            )
        if self.set_aside:
            raise UserError(
                f"{self._workdir} has no checkpoint to go on from, only damaged ones that were set aside in "
                f"{DAMAGED_DIR}/ ({', '.join(self.set_aside)}); use another --workdir to train from the beginning."
            )
        return None

    def restore_params(self, step: int, params: Any) -> Any:
        """The parameters of a checkpoint alone, for generation; raises whatever Orbax does."""
        self._check_shapes(step, {"params": params})
        return self._manager.restore(step, args=ocp.args.Composite(params=_as(params)))["params"]

    def _restore(self, step: int, targets: dict[str, Any]) -> tuple[Any, Any, Any]:
        self._check_shapes(step, {name: targets[name] for name in ("params", "opt_state")})
        known = {path.split("/")[0] for path in self._stored_shapes(step, ["progress"])["progress"]}
        targets["progress"] = {name: value for name, value in targets["progress"].items() if name in known}
        # Not by the manager, which waits for the other processes even where one of them has failed.
        folder, handler = self._manager.directory / str(step), _handler()
        return tuple(handler.restore(folder / name, args=_as(targets[name])) for name in ITEMS)

    def _stored_shapes(self, step: int, items: Iterable[str]) -> dict[str, dict[str, tuple[int, ...]]]:
        """For each item {path of an array: its shape}; opens every array, and raises where one is not there."""
        folder, handler = self._manager.directory / str(step), _handler()
        return {name: _shapes(handler.metadata(folder / name).tree) for name in items}

    def _check_shapes(self, step: int, targets: dict[str, Any]):
        """Raises UserError where the stored shapes are not those of the targets."""
        stored = self._stored_shapes(step, targets)
        for item, target in targets.items():
            wanted, there = _shapes(target), stored[item]
            for path in sorted(wanted.keys() | there.keys()):
                if wanted.get(path) != there.get(path):
                    raise UserError(
                        f"Checkpoint {step} in {self._directory} is of another {_OWNERS[item]}: {item}/{path} is "
                        f"{there.get(path, 'not there')}, in this run {wanted.get(path, 'not there')}. Give the recipe "
                        "that it was trained with, or use another --workdir."
                    )

    def _is_damage(self, step: int, error: Exception) -> bool:
        """Whether the files of a checkpoint are to blame for an error. Where they lie elsewhere, only if it says so."""
        said = f"{type(error).__name__} {error}"
        said = PATHS.sub("", said)  # a folder's name may be any word
        if NOT_DAMAGE.search(said):
            return False
        return bool(REMOTE_DAMAGE.search(said)) if is_remote(self._directory) else self._is_readable(step)

    def _is_readable(self, step: int) -> bool:
        """Whether every file of a checkpoint on this machine can be read to its end by this process."""
        try:
            for folder, _, names in os.walk(self._directory / str(step), onerror=_raise):
                for name in names:
                    with open(os.path.join(folder, name), "rb") as file:
                        while file.read(1 << 24):
                            pass
        except OSError:
            return False
        return True

    def _set_aside(self, steps: list[int]):
        """Moves checkpoints to where their names are free: the first process of the run does, the others wait."""
        if not steps:
            return
        folder = self._workdir / DAMAGED_DIR
        for step in steps if jax.process_index() == 0 else ():
            folder.mkdir(parents=True, exist_ok=True)
            names = (f"{step}" if n == 0 else f"{step}.{n}" for n in range(10**6))
            place = next(folder / name for name in names if not (folder / name).exists())
            logging.error("Checkpoint %d is damaged: moved to %s.", step, place)
            (self._directory / str(step)).rename(place)
        multihost_utils.sync_global_devices("transformer_lm: damaged checkpoints are set aside")
        self._manager.reload()

    def close(self):
        """Waits for the last save and lets go of the folder."""
        try:
            self.wait()
        finally:
            self._manager.close()
            if self._alias:
                self._alias.cleanup()


def _handler() -> ocp.PyTreeCheckpointHandler:
    """Orbax's, but that devices with copies of a small array do not share the work of saving it.

    Each of them would compile and run a program that cuts its share out.
    """
    handlers = {kind: ocp.type_handlers.get_type_handler(kind) for kind in ocp.type_handlers.supported_types()}
    handlers[jax.Array] = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SHARED_FROM_BYTES)
    registry = ocp.type_handlers.create_type_handler_registry(*handlers.items())
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _as(target: Any) -> ocp.args.PyTreeRestore:
    """How an item is restored: like a tree of `jax.ShapeDtypeStruct` with shardings."""
    return ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))


# What comes of reading a checkpoint.
_READ, _DAMAGED, _HIDDEN = range(3)


def _worst(outcome: int) -> int:
    """Of all processes of the run, for which it waits."""
    return int(np.max(multihost_utils.process_allgather(np.asarray(outcome))))


_OWNERS = {"params": "network", "opt_state": "optimizer"}


def _alias(workdir: epath.Path) -> tempfile.TemporaryDirectory | None:
    """A temporary folder with a link to a workdir whose name misleads the libraries; None where the name is plain."""
    if is_remote(workdir) or not MISLEADING.search(os.fspath(workdir)):
        return None
    workdir.mkdir(parents=True, exist_ok=True)
    folder = tempfile.TemporaryDirectory(prefix="transformer_lm_", ignore_cleanup_errors=True)
    os.symlink(workdir, os.path.join(folder.name, "workdir"))
    return folder


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the arrays of a tree, of targets or of Orbax's metadata."""
    return {path: tuple(leaf.shape) for path, leaf in ocp.tree.to_flat_dict(tree, sep="/").items()}


def _raise(error: OSError):
    raise error


def first_line(error: BaseException) -> str:
    """What an error of a library says, in a line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
