"""Several processes as one run, on JAX's own distributed runtime: who is who, what only one does, who has gone.

Every process runs the same command and the same steps. The first one also prepares the data, writes logs and metrics,
and decides for all; checkpoints are written by all.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from absl import logging
from etils import epath
from jax._src.distributed import global_state  # as Orbax does: the store of keys and values has no public name

from transformer_lm.errors import UserError, may_not_be_written, one_line
from transformer_lm.files import appears, cache_place, write_atomically

HEARTBEAT_SECONDS = 30  # a process that was not heard of for so long has gone
POLL_SECONDS = 0.2
PATIENCE_SECONDS = 20  # until a folder shows what another machine has written
LONGEST_WAIT_MS = 24 * 3600 * 1000  # for the others' rows to be checked; one that has gone is missed long before
SHARED_FILE = ".shared-"  # with the run's own name behind it
GONE = "error: Another process of this run has gone; run the same command in all of them again to go on.\n"
# What libraries say when a process they talk to has gone. They tell by words alone.
HAS_GONE = re.compile(r"gloo|nccl|coordination|closed by peer|connection reset|heartbeat", re.IGNORECASE)

Result = TypeVar("Result")


def start(coordinator_address: str | None, num_processes: int | None, process_id: int | None):
    """Joins the other processes of a run, before JAX is used for anything else.

    TPU pods, SLURM and Open MPI are detected as JAX does; where nothing is detected and nothing given, the run has
    this process alone. Only the first process logs more than warnings.

    Args:
      coordinator_address: HOST:PORT of the first process.
      num_processes: of the whole run; 1 leaves detection out.
      process_id: number of this one, from 0.

    Raises:
      UserError: the processes did not find together.
    """
    flags = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    given = {name: value for name, value in flags.items() if value is not None}
    if num_processes == 1 or (not given and _is_only_task()):
        return
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is for signals.py
    # A CPU that is a process's only device would begin a program before the last one has ended, in other orders in
    # other processes: what they tell each other would not match (jax 0.10).
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(
            **given, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=PATIENCE_SECONDS
        )
    except Exception as error:
        if not given and isinstance(error, ValueError) and "coordinator_address" in str(error):
            return  # no cluster
        raise UserError(
            f"The processes of this run did not find together: {one_line(error)}. Give each of them "
            "--coordinator_address=HOST:PORT --num_processes=N --process_id=0..N-1, or --num_processes=1 for a run of "
            "this process alone."
        ) from error
    if global_state.num_processes > 1:
        _explain_abort()
    if not is_first():
        logging.set_verbosity(logging.WARNING)


def share_compilations(workdir: str):
    """Lets all processes of a run find what was compiled before, in the workdir: JAX's first process alone writes it.

    A user's own JAX_COMPILATION_CACHE_DIR stays as it is.
    """
    own = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    if global_state.num_processes > 1 and own.startswith(f"{cache_place()}{os.sep}"):
        jax.config.update("jax_compilation_cache_dir", os.path.join(workdir, "compiled", os.path.basename(own)))


def _is_only_task() -> bool:
    """Whether Slurm or Open MPI has begun this process alone, which has all devices then: JAX would give it one."""
    return os.environ.get("OMPI_COMM_WORLD_SIZE", os.environ.get("SLURM_NTASKS")) == "1"


def is_first() -> bool:
    """Whether this process is the one that writes and decides."""
    return global_state.process_id == 0


def agree(name: str, make: Callable[[], Any]) -> Any:
    """What the first process makes, in every process; as JSON. `name` is used once in a run."""
    if global_state.num_processes == 1:
        return make()
    key = f"transformer_lm/{name}"
    if is_first():
        value = make()
        global_state.client.key_value_set(key, json.dumps(value))
        return value
    while True:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # it is not there yet
            return json.loads(global_state.client.key_value_try_get(key))
        time.sleep(POLL_SECONDS)


def first_alone(
    prepare: Callable[[], Result], tell: Callable[[Result], Any], find: Callable[[Any], Result], folders: list[str]
) -> Result:
    """What `prepare` returns in the first process of a run; the others then find it done in the folders.

    Args:
      prepare: does the work.
      tell: what the others are to be told of its result, for JSON.
      find: makes a result of what was told.
      folders: where the work lies.

    Raises:
      UserError: a process does not see the folders of the first.
    """
    if global_state.num_processes == 1:
        return prepare()
    if is_first():
        result = prepare()
    name = SHARED_FILE + agree("run", lambda: uuid.uuid4().hex)  # other runs may share a folder, too
    marks = [epath.Path(folder) / name for folder in folders]
    marked = agree("marked", lambda: [_mark(mark) for mark in marks])
    told = agree("prepared", lambda: tell(result))
    if not is_first():
        for mark, is_there in zip(marks, marked, strict=True):
            if is_there:
                _wait_for(mark)
        result = find(told)
    together("prepared")
    if is_first():
        for mark in marks:
            mark.unlink(missing_ok=True)
    return result


def _mark(file: epath.Path) -> bool:
    """Makes a file; False where that may not be done, so that nothing can have been made there either."""
    try:
        write_atomically(file, b"")
    except OSError as error:
        if not may_not_be_written(error):
            raise
        return False
    return True


def _wait_for(file: epath.Path):
    if not appears(file, PATIENCE_SECONDS):
        raise UserError(
            f"{file.parent} is not the folder that the first process of the run has under this name: it has to be on a "
            "file system or in a bucket that all of them share."
        )


def together(name: str):
    """Waits for all processes; each name once in a run."""
    if global_state.num_processes > 1:
        global_state.client.wait_at_barrier(f"transformer_lm/{name}", LONGEST_WAIT_MS)


def leave():
    """The run's end: waits a little for the other processes, which would else miss this one."""
    with contextlib.suppress(Exception):
        jax.distributed.shutdown()


@contextlib.contextmanager
def losses_explained() -> Iterator[None]:
    """Says in one line when an error within means that another process has gone."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, UserError) as error:
        reason = error.__cause__ if isinstance(error, UserError) else error  # of a save that failed for it
        is_ours = isinstance(reason, jax.errors.JaxRuntimeError) and HAS_GONE.search(str(reason))
        if global_state.num_processes > 1 and is_ours:
            _saying.acquire()  # where the abort says it, it ends the process meanwhile
            raise UserError(GONE.removeprefix("error: ").strip()) from error
        raise


def _explain_abort():
    """JAX's runtime aborts the process, from a thread of its own, when another has gone: adds a line, and status 1."""
    global _handler
    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(_on_abort)
    ctypes.CDLL(None).signal(signal.SIGABRT, _handler)


def _on_abort(number: int):
    del number
    if _saying.acquire(blocking=False):
        os.write(2, GONE.encode())
    else:
        time.sleep(PATIENCE_SECONDS)  # in which the main thread says it, and ends the process
    os._exit(1)


_handler: Any = None  # C keeps no reference
_saying = threading.RLock()  # who has it says that another process has gone, and keeps it
