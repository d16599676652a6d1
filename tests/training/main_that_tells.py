"""main.py, each of whose processes writes down what it restored and which rows it read, and has a clock of its own.

python main_that_tells.py --workdir=WORKDIR ...: in WORKDIR/told/PROCESS/ "state", a pickle of {path of an array: its
parts on the devices of the process, as (index, values)}, and "rows", a line of JSON a step, {number of a row: tokens}.
The clock by which a process saves goes twice as fast as that of the process before it. One that has gone is missed
sooner. The process whose number TOLD_TO_STOP is gets a signal before it restores.
"""

import json
import os
import pickle
import runpy
import signal
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from transformer_lm.data import input_pipeline
from transformer_lm.training import distributed, loop

restore, read = loop.restore_or_init, input_pipeline.train_batches


def folder() -> Path:
    [workdir] = (word.removeprefix("--workdir=") for word in sys.argv if word.startswith("--workdir="))
    path = Path(workdir) / "told" / str(jax.process_index())
    path.mkdir(parents=True, exist_ok=True)
    return path


def restore_and_tell(*arguments, **options):
    if os.environ.get("TOLD_TO_STOP") == str(jax.process_index()):
        os.kill(os.getpid(), signal.SIGTERM)
    state, rows = restore(*arguments, **options)
    arrays = ocp.tree.to_flat_dict({"params": state.params, "opt_state": state.opt_state}, sep="/")
    parts = {
        path: [(part.index, np.asarray(part.data)) for part in array.addressable_shards]
        for path, array in arrays.items()
    }
    (folder() / "state").write_bytes(pickle.dumps(parts))
    (folder() / "rows").write_text("")
    return state, rows


def read_and_tell(*arguments, only, **options):
    for batch in read(*arguments, only=only, **options):
        with (folder() / "rows").open("a") as file:
            print(json.dumps(dict(zip(only.tolist(), batch["targets"].tolist(), strict=True))), file=file)
        yield batch


if __name__ == "__main__":
    distributed.HEARTBEAT_SECONDS = 10
    loop.time = types.SimpleNamespace(monotonic=lambda: time.monotonic() * 2 ** jax.process_index())
    loop.restore_or_init, input_pipeline.train_batches = restore_and_tell, read_and_tell
    runpy.run_module("transformer_lm.main", run_name="__main__", alter_sys=True)
