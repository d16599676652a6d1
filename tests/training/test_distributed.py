"""Two processes of four devices each as one run: real processes, real kills."""

import errno
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import command, one_line_error, run
from processes import Fork

from transformer_lm.checkpoints import loading
from transformer_lm.training import distributed
from transformer_lm.training.reporter import SPEEDS

FIELDS = {
    "num_train_steps": 40, "log_every_steps": 1, "eval_every_steps": 20, "checkpoint_every_steps": 20,
    "keep_checkpoints": 10, "global_batch_size": 8, "per_device_batch_size": 1, "mesh_fsdp": 8, "num_layers": 1,
    "num_eval_steps": 3, "eval_per_device_batch_size": 2, "vocab_size": 800, "sampling_temperature": 0,
    "norm": "rms", "use_bias": False,  # fewer arrays, of which each is a message a device and step
}  # fmt: skip
ENDLESS = {"num_train_steps": 10_000, "eval_every_steps": 10_000, "checkpoint_every_steps": 2}


def start(workdir, *, processes: int, devices: int, told: int | None = None, **fields) -> list[Fork]:
    """Starts a run of so many processes, of so many devices each; one may be told to stop before it restores."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    started = []
    for number in range(processes):
        place = workdir[number] if isinstance(workdir, list) else workdir
        own = [f"--coordinator_address=localhost:{port}", f"--num_processes={processes}", f"--process_id={number}"]
        arguments = command("main", place, *own * (processes > 1), **FIELDS | fields)[3:]
        line = [sys.executable, "-m", "main_that_tells", *arguments]
        environment = os.environ | {"XLA_FLAGS": flags, "TOLD_TO_STOP": str(told)}
        started.append(Fork(line, env=environment, cwd=Path(__file__).parent))
    return started


def finish(started: list[Fork]) -> list[subprocess.CompletedProcess]:
    outputs = [process.communicate() for process in started]
    ended = zip(started, outputs, strict=True)
    return [subprocess.CompletedProcess([], process.returncode, *output) for process, output in ended]


def train(workdir, **options) -> list[subprocess.CompletedProcess]:
    """Runs to the end."""
    done = finish(start(workdir, **options))
    assert [process.returncode for process in done] == [0] * len(done), "\n".join(process.stderr for process in done)
    return done


def metrics_of(workdir) -> list[dict]:
    """The lines of metrics.jsonl, without the times."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in SPEEDS} for line in lines]


def assert_same(ours: list[dict], theirs: list[dict], rtol: float):
    """The same lines; of perplexities the logarithms, which are losses, are compared."""
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for name, value in one.items():
            pair = np.log([value, other[name]]) if name.endswith("perplexity") else (value, other[name])
            np.testing.assert_allclose(*pair, rtol=rtol, err_msg=f"{name} at step {one['step']}")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The workdir of a run of one process of eight devices."""
    workdir = tmp_path_factory.mktemp("unbroken")
    train(workdir, processes=1, devices=8)
    return workdir


TWO = {"processes": 2, "devices": 4}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The workdir of the same run in two processes of four devices, which nothing befalls."""
    workdir = tmp_path_factory.mktemp("two")
    train(workdir, **TWO)
    return workdir


@pytest.fixture(scope="module", autouse=True)
def apart(tmp_path_factory):
    """A run whose two processes do not see each other's folders, which they wait for: begun before all else."""
    folder = tmp_path_factory.mktemp("apart")
    return folder, start([folder / "here", folder / "there"], processes=2, devices=1, mesh_fsdp=2)


def half_of(run, folder) -> Path:
    """A copy of a run as it was after twenty of its forty steps."""
    shutil.copytree(run, folder / "copy", ignore=lambda _, names: {"40"} & set(names))
    return folder / "copy"


def test_two_processes_are_as_one(unbroken, two):
    """One process of eight devices, and two of four: the same metrics, of the same rows."""
    assert rows_of(two, 2) == rows_of(unbroken, 1)
    assert_same(metrics_of(two), metrics_of(unbroken), rtol=1e-6)


TENSOR = {"processes": 1, "devices": 2, "mesh_fsdp": 1, "mesh_tensor": 2, "global_batch_size": 0}


@pytest.mark.parametrize(
    ("begun", "options", "batch"),
    [("two", TENSOR, "8 rows a step in 4 parts"), ("unbroken", TWO | {"mesh_fsdp": 2}, "8 rows a step")],
)
def test_goes_on_elsewhere(begun, options, batch, unbroken, request, tmp_path):
    """On another mesh, other devices or processes: the same bits, then for twenty steps the same rows and losses."""
    workdir, processes = half_of(request.getfixturevalue(begun), tmp_path), options["processes"]
    done = train(workdir, **options)
    assert re.search(rf"Resuming at step 20 of 40.*{batch}\.$", done[0].stderr, re.MULTILINE)
    assert "step 40:" in done[0].stderr
    assert not any("step" in process.stderr for process in done[1:])  # one process speaks
    assert_as_saved(workdir, workdir / "checkpoints" / "20", processes)
    assert rows_of(workdir, processes) == rows_of(unbroken, 1)[20:]
    assert_same(metrics_of(workdir), metrics_of(unbroken), rtol=1e-6)
    assert loading.load_model(workdir).step == 40


def test_begins_with_another_model(two, tmp_path):
    """Two processes of four devices, each with its parts alone of what it reads."""
    train(tmp_path, **TWO | {"init_from": two, "num_train_steps": 1})
    assert_as_saved(tmp_path, two / "checkpoints" / "40", 2, items=("params",))


def assert_as_saved(workdir, checkpoint, processes: int, items=("params", "opt_state")):
    """What the processes began with together is what a checkpoint has, bit for bit."""
    saved = ocp.tree.to_flat_dict({item: in_numpy(checkpoint / item) for item in items}, sep="/")
    told = [pickle.loads((workdir / "told" / str(number) / "state").read_bytes()) for number in range(processes)]
    told = [{path: value for path, value in parts.items() if path.startswith(items)} for parts in told]
    assert all(parts.keys() == saved.keys() for parts in told)
    for path, expected in saved.items():
        seen = np.zeros(expected.shape, bool)
        for index, values in (part for parts in told for part in parts[path]):
            assert values.dtype == expected.dtype
            assert values.tobytes() == np.asarray(expected[index]).tobytes()
            seen[index] = True
        assert seen.all()


def in_numpy(folder):
    """The arrays of an item of a checkpoint, wherever they lay when they were saved."""
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        return checkpointer.restore(folder, jax.tree.map(lambda array: np.empty(array.shape, array.dtype), tree))


def rows_of(workdir, processes: int) -> list[dict[str, list[int]]]:
    """The rows that all processes read together at each step."""
    folders = [workdir / "told" / str(number) for number in range(processes)]
    told = [[json.loads(line) for line in (folder / "rows").read_text().splitlines()] for folder in folders]
    return [{row: tokens for part in parts for row, tokens in part.items()} for parts in zip(*told, strict=True)]


def wait_for(path):
    deadline = time.monotonic() + 200
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def test_stopped_together(unbroken, tmp_path):
    """A signal to one of two stops both after the same step, with a checkpoint of it; till then they are as one.

    They have a device each: whoever has more computes one program after the other in any case. They save by their
    clocks, which are not the same.
    """
    by_the_clock = {"mesh_fsdp": 2, "checkpoint_every_steps": 10_000, "checkpoint_every_minutes": 0.02}
    both = start(tmp_path, processes=2, devices=1, **ENDLESS | by_the_clock)
    saved: set[str] = set()
    while len(saved) < 3 and all(process.poll() is None for process in both):
        saved |= {path.name for path in tmp_path.glob("checkpoints/*") if path.name.isdigit()}
        time.sleep(0.05)
    both[1].send_signal(signal.SIGTERM)
    done = finish(both)
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    [step] = re.findall(r"Stopped by another process at step (\d+): a checkpoint is saved", done[0].stderr)
    assert (tmp_path / "checkpoints" / step).exists()
    ours, theirs = ([line for line in metrics_of(run) if "train_loss" in line] for run in (tmp_path, unbroken))
    assert len(ours) == int(step)
    assert_same(ours[:20], theirs[: len(ours[:20])], rtol=1e-6)


def test_stopped_together_before_the_first_step(tmp_path):
    """A signal to one of two, while they begin, does not part them."""
    done = finish(start(tmp_path, processes=2, devices=1, told=1, mesh_fsdp=2, num_train_steps=1000))
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    assert "Stopped by another process at step 0: nothing is saved" in done[0].stderr


@pytest.fixture(scope="module")
def killed(two, tmp_path_factory):
    """The half run that goes on in two processes, the second of them killed after a save; and how the first ended."""
    workdir = half_of(two, tmp_path_factory.mktemp("killed"))
    both = start(workdir, **TWO | ENDLESS)
    wait_for(workdir / "checkpoints" / "24")
    both[1].send_signal(signal.SIGKILL)
    killed_at = time.monotonic()
    first, _ = finish(both)
    return workdir, first, time.monotonic() - killed_at


def test_one_that_is_killed_ends_the_other(killed):
    _, first, seconds = killed
    assert "Another process of this run has gone" in one_line_error(first)
    assert seconds < 60


def test_started_again_it_is_the_unbroken_run(killed, two):
    """After a kill, and damage to what one of them saved last, both go on to the bits of a run that nothing befell."""
    workdir, *_ = killed
    steps = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    assert max(steps) > 20
    for step in steps:
        if step > 38:
            shutil.rmtree(workdir / "checkpoints" / str(step))
    damaged = max(step for step in steps if step <= 38)
    for file in (workdir / "checkpoints" / str(damaged) / "params" / "ocdbt.process_1" / "d").iterdir():
        file.write_bytes(file.read_bytes()[:10])  # which only the second of them reads
    first, _ = train(workdir, **TWO)
    assert f"Checkpoint {damaged} is damaged: moved to" in first.stderr
    assert (workdir / "damaged_checkpoints" / str(damaged)).exists()
    assert metrics_of(workdir) == metrics_of(two)
    params = [loading.load_model(folder).params for folder in (workdir, two)]
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_a_folder_that_is_not_shared(apart):
    """Said by the process that does not see it; the other does not wait for ever."""
    folder, started = apart
    first, second = finish(started)
    assert f"{folder / 'there'} is not the folder that the first process" in one_line_error(second)
    assert "Another process of this run has gone" in one_line_error(first)
    assert not (folder / "here" / "checkpoints").exists()


def test_a_folder_that_may_only_be_read_is_no_fault(tmp_path, monkeypatch):
    """Such as a prepared_dir with all rows: nothing can have been made there. Another error is one."""

    def write(number):
        def fail(path, content):
            raise OSError(number, os.strerror(number), str(path))

        return fail

    assert distributed._mark(tmp_path / "mark")
    monkeypatch.setattr(distributed, "write_atomically", write(errno.EROFS))
    assert not distributed._mark(tmp_path / "other")
    monkeypatch.setattr(distributed, "write_atomically", write(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        distributed._mark(tmp_path / "other")


@pytest.mark.parametrize(("processes", "own", "shared"), [(2, False, True), (1, False, False), (2, True, False)])
def test_all_processes_find_what_was_compiled(monkeypatch, tmp_path, processes, own, shared):
    """In the workdir, unless the user has said where, since JAX lets the first process alone write."""
    monkeypatch.setenv("TRANSFORMER_LM_CACHE", str(tmp_path / "cache"))
    place = str(tmp_path / ("own" if own else "cache") / "xla-1")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", place)
    monkeypatch.setattr(distributed.global_state, "num_processes", processes)
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", place)
        distributed.share_compilations(str(tmp_path / "run"))
        found = jax.config.jax_compilation_cache_dir
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert found == (str(tmp_path / "run" / "compiled" / "xla-1") if shared else place)


def test_flags_that_do_not_suffice(tmp_path):
    done = run(command("main", tmp_path, "--num_processes=2"))
    assert "--coordinator_address=HOST:PORT --num_processes=N --process_id=0..N-1" in one_line_error(done)
