"""Runs the same tasks on one machine, on a Slurm cluster or on a Ray cluster, by datatrove's executors.

A task is a pipeline of datatrove steps that works on its share of the shards. Finished tasks are marked in a folder
that all machines see; whatever was interrupted is done again by the same command, finished tasks are not.
"""

import dataclasses
import functools
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence

from absl import logging
from etils import epath

from transformer_lm import console
from transformer_lm.data import workers
from transformer_lm.errors import UserError
from transformer_lm.extras import optional_import
from transformer_lm.files import write_atomically

EXECUTORS = ("local", "slurm", "ray")
_PATTERN = re.compile("[*?[\ud800-\udfff]|::")
POLL_SECONDS = 20
MAX_FAILURES = 30  # of squeue, one after the other: a controller that is started anew is back within ten minutes


@dataclasses.dataclass(frozen=True)
class Launcher:
    """Where tasks run.

    Attributes:
      executor: one of EXECUTORS.
      tasks: into how many tasks the work is cut; more than the corpus has shards are idle.
      workers: how many run at once; -1 for all.
      mem_per_task_gb: memory that Slurm or Ray reserves for a task.
      slurm_partition: Slurm's partition.
      slurm_time: Slurm's limit of time for a task, HH:MM:SS.
    """

    executor: str = "local"
    tasks: int = 1
    workers: int = -1
    mem_per_task_gb: int = 4
    slurm_partition: str | None = None
    slurm_time: str = "20:00:00"

    def __post_init__(self):
        if self.executor not in EXECUTORS:
            raise UserError(f"--executor={self.executor} must be one of {', '.join(EXECUTORS)}.")
        if self.tasks < 1:
            raise UserError(f"--tasks={self.tasks} must be at least 1.")
        if self.workers < 1 and self.workers != -1:
            raise UserError(f"--workers={self.workers} must be at least 1, or -1 for as many as there are tasks.")
        if self.executor == "slurm" and not self.slurm_partition:
            raise UserError("--executor=slurm needs --slurm_partition=NAME (sinfo lists them).")

    def run(self, name: str, steps: Sequence, folder: epath.Path, tasks: int | None = None):
        """Runs all tasks of a stage that are not finished yet, and returns when they are.

        Args:
          name: the stage's name.
          steps: datatrove steps; a task calls each with its own number and the number of tasks.
          folder: where logs and the marks of finished tasks lie.
          tasks: how many there are; None for `self.tasks`.

        Raises:
          UserError: a task failed.
        """
        if _PATTERN.search(str(folder)):
            raise UserError(
                f"{folder}: datatrove takes *, ?, [ and :: in a folder's name for a pattern, and wants UTF-8; choose "
                "another with --config.prepared_dir."
            )
        console.quiet_datatrove()
        executor = self._make(name, list(steps), str(folder), tasks or self.tasks)
        failure: Exception | None = None
        try:
            if self.executor == "slurm":
                _run_on_slurm(executor, folder / "slurm_job")
            else:
                try:
                    with console.only_our_lines():
                        executor.run()
                finally:
                    console.quiet_datatrove()  # which has put its own way in place again
        except UserError:
            raise
        except Exception as error:  # whatever a task raises; the others' marks stay
            failure = error
        incomplete = executor.get_incomplete_ranks(skip_completed=True)
        if incomplete:
            why = f" ({failure})" if failure else ""
            raise UserError(
                f"{len(incomplete)} of {executor.world_size} tasks of the stage {name!r} failed{why}; "
                f"their logs lie in {folder}/logs. The same command does them again."
            ) from failure
        if failure:
            raise failure

    def _make(self, name: str, steps: list, folder: str, tasks: int):
        if self.executor == "local":
            import multiprocess
            from datatrove.executor import LocalPipelineExecutor

            first, once = "transformer_lm.data.task_process", "transformer_lm.data.datatrove_steps"
            multiprocess.set_forkserver_preload([first, once])  # once, not for each task
            _end_forks_with(os.getpid())
            steps = [functools.partial(_end_with_executor, os.getpid()), *steps]
            at_once = tasks if self.workers == -1 else min(tasks, self.workers)
            return LocalPipelineExecutor(steps, tasks=tasks, workers=at_once, logging_dir=folder)
        memory = self.mem_per_task_gb
        if self.executor == "slurm":
            from datatrove.executor import SlurmPipelineExecutor

            return SlurmPipelineExecutor(
                steps, tasks=tasks, workers=self.workers, logging_dir=folder, job_name=name, qos="",
                time=self.slurm_time, partition=self.slurm_partition, mem_per_cpu_gb=memory,
                env_command=f"export PATH={shlex.quote(os.path.dirname(sys.executable))}:$PATH",
            )  # fmt: skip
        ray = optional_import("ray", "prep", "--executor=ray")
        from datatrove.executor import RayPipelineExecutor

        if not ray.is_initialized():
            ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False)
        return RayPipelineExecutor(steps, tasks=tasks, workers=self.workers, logging_dir=folder, mem_per_cpu_gb=memory)


def _end_with_executor(executor: int, data, rank: int, world_size: int):
    """A step that does nothing but see to it that a process of the local executor ends when that one was killed."""
    del rank, world_size
    if os.getpid() != executor:
        workers.end_with(executor)
    return data


@functools.cache
def _end_forks_with(process: int):
    """So, too, for what the executor forks off itself: the process that keeps the state which tasks share."""
    os.register_at_fork(after_in_child=functools.partial(workers.end_with, process))


def _run_on_slurm(executor, record: epath.Path):
    """Submits a job and waits for its end; first for that of an earlier command, which may have been killed.

    Args:
      executor: datatrove's.
      record: the file that holds the number of a job whose end was not seen.
    """
    if record.exists():
        earlier = record.read_text()
        logging.info("Slurm job %s was submitted by an earlier command, and is waited for.", earlier)
        _wait_for_slurm(executor, earlier)
    executor.run()
    write_atomically(record, str(executor.job_id).encode())
    _wait_for_slurm(executor, executor.job_id)
    record.unlink()


def _wait_for_slurm(executor, job: str | int):
    """Returns when all of an executor's tasks are finished, or when Slurm says that a job, its or another, is over."""
    failures = 0
    while incomplete := executor.get_incomplete_ranks(skip_completed=True):
        logging.info("Slurm job %s: %d of %d tasks to go.", job, len(incomplete), executor.world_size)
        try:
            if not _is_queued(job):
                return
            failures = 0
        except (OSError, subprocess.SubprocessError) as error:
            failures += 1
            logging.warning("squeue failed (%d of %d times): %s", failures, MAX_FAILURES, error)
            if failures == MAX_FAILURES:
                raise UserError(
                    f"squeue failed {failures} times, the last time with {str(error)!r}. Job {job} may "
                    f"still run (scancel {job} ends it): the same command, started again, waits for it."
                ) from error
        time.sleep(POLL_SECONDS)


def _is_queued(job: str) -> bool:
    """Whether Slurm has a job in its queue; raises OSError or SubprocessError where it cannot be asked."""
    command = ["squeue", "-h", "-j", str(job)]
    queue = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120)
    if queue.returncode == 0:
        return bool(queue.stdout.strip())
    if "invalid job id" in queue.stderr.lower():  # as it says of a job that is long over
        return False
    raise OSError(" ".join(queue.stderr.split()) or f"exit status {queue.returncode}")
