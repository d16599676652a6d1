"""Blocks of rows, made by processes of this machine."""

import concurrent.futures
import concurrent.futures.process
import json
import multiprocessing
import signal

from transformer_lm import console
from transformer_lm.data.rows import RowsPlan, blocks_of
from transformer_lm.files import children


def make_blocks(plan: RowsPlan, processes: int) -> list[str]:
    """Does the blocks that are not done yet, in processes, with a progress bar; returns the names of all."""
    names: list[str] = []
    characters = 0
    waiting: set[concurrent.futures.Future] = set()
    done = {path.name: path for path in children(plan.directory) if path.suffix == ".json"}
    with console.progress(f"Preparing {plan.corpus.title}") as report, _pool(processes) as pool:

        def collect(when):
            nonlocal waiting, characters
            finished, waiting = concurrent.futures.wait(waiting, return_when=when)
            characters += sum(future.result()["characters"] for future in finished)
            report(characters)

        for number, block in enumerate(blocks_of(plan.corpus.documents)):
            names.append(f"rows-{number:06d}")
            if (path := done.get(f"{names[-1]}.json")) is not None:
                characters += json.loads(path.read_text())["characters"]
                continue
            waiting.add(pool.submit(plan.write_block, names[-1], block))
            if len(waiting) > processes:
                collect(concurrent.futures.FIRST_COMPLETED)
        collect(concurrent.futures.ALL_COMPLETED)
    return names


def _pool(processes: int) -> concurrent.futures.ProcessPoolExecutor:
    """Worker processes; spawned, since JAX's threads do not survive a fork. Ctrl-C is the parent's to handle."""
    return concurrent.futures.ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
