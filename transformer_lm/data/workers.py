"""Blocks of rows, made by processes of this machine."""

import concurrent.futures
import concurrent.futures.process
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator

from transformer_lm import console
from transformer_lm.data.rows import RowsPlan, blocks_of, read_block
from transformer_lm.errors import UserError

WATCH_SECONDS = 0.5


def make_blocks(plan: RowsPlan, processes: int) -> list[str]:
    """Does the blocks that are not done yet, with a progress bar; returns the names of all.

    Where one process is enough it is this one.
    """
    names: list[str] = []
    characters = 0
    waiting: set[concurrent.futures.Future] = set()
    with console.progress(f"Preparing {plan.corpus.title}") as report, _pool(processes) as pool:

        def collect(when):
            nonlocal waiting, characters
            finished, waiting = concurrent.futures.wait(waiting, return_when=when)
            characters += sum(future.result()["characters"] for future in finished)
            report(characters)

        for number, block in enumerate(blocks_of(plan.corpus.documents)):
            names.append(f"rows-{number:06d}")
            if (done := read_block(plan.directory, names[-1])) is not None:
                characters += done["counts"]["characters"]
                report(characters)
                continue
            if processes == 1:
                characters += plan.write_block(names[-1], block)["characters"]
                report(characters)
                continue
            with _without_main_module():
                waiting.add(pool.submit(plan.write_block, names[-1], block))
            if len(waiting) > processes:
                collect(concurrent.futures.FIRST_COMPLETED)
        collect(concurrent.futures.ALL_COMPLETED)
    return names


def cores() -> int:
    """How many this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _pool(processes: int) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """Worker processes; spawned, since JAX's threads do not survive a fork. After an error none is waited for."""
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(processes, spawn, _begin)
    try:
        yield pool
        pool.shutdown()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError(
            "A process that prepares rows was killed, perhaps for want of memory. Run the same command to go on; "
            "with a smaller prepare_processes it needs less."
        ) from error
    finally:
        left = list((pool._processes or {}).values())  # none, but after an error
        pool.shutdown(wait=False, cancel_futures=True)
        for process in left:  # for which Python would wait at its end
            process.kill()


def _begin():
    """In a worker: Ctrl-C is the parent's to handle, and without it there is nothing to work for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(multiprocessing.parent_process().pid)


def end_with(process: int):
    """Ends this process soon after another of this machine has ended, its parent as a rule, however that was killed."""
    is_child = os.getppid() == process

    def watch():
        with contextlib.suppress(ProcessLookupError):
            while not is_child or os.getppid() == process:
                os.kill(process, 0)  # does nothing but raise when there is no such process
                time.sleep(WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _without_main_module() -> Iterator[None]:
    """Processes that are spawned within do not import the program's main module.

    It may import JAX, seconds and hundreds of megabytes for each worker, or be a script that would start all over.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
