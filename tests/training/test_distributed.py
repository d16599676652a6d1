"""Two processes of four devices each as one run: real processes, real kills."""

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

from transformer_lm.checkpoints import loading
from transformer_lm.training.reporter import SPEEDS

FIELDS = {
    "num_train_steps": 6, "log_every_steps": 1, "eval_every_steps": 3, "checkpoint_every_steps": 2,
    "keep_checkpoints": 3, "global_batch_size": 16, "num_heads": 2, "per_device_batch_size": 2, "mesh_fsdp": 2,
    "num_eval_steps": 3, "eval_per_device_batch_size": 2, "vocab_size": 800,
}  # fmt: skip
# A run of which another goes on twenty steps before its end.
LONG = {"num_train_steps": 24, "eval_every_steps": 12, "checkpoint_every_steps": 4, "keep_checkpoints": 6}
SCRIPT = Path(__file__).with_name("main_that_tells.py")


def start(workdir, *, processes: int, devices: int, **fields) -> list[subprocess.Popen]:
    """Starts a run of so many processes, of so many devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    started = []
    for number in range(processes):
        place = workdir[number] if isinstance(workdir, list) else workdir
        own = [f"--coordinator_address=localhost:{port}", f"--num_processes={processes}", f"--process_id={number}"]
        line = [sys.executable, SCRIPT, *command("main", place, *own * (processes > 1), **FIELDS | fields)[3:]]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(line, env=os.environ | {"XLA_FLAGS": flags}, **pipes))
    return started


def finish(started: list[subprocess.Popen]) -> list[subprocess.CompletedProcess]:
    ended = []
    for process in started:
        output, errors = process.communicate(timeout=300)
        ended.append(subprocess.CompletedProcess(process.args, process.returncode, output, errors))
    return ended


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
    train(workdir, processes=1, devices=8, **LONG)
    return workdir


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The workdir of a run of two processes, of which the second was killed after a save, and how the first ended."""
    workdir = tmp_path_factory.mktemp("killed")
    both = start(workdir, processes=2, devices=4, num_train_steps=10_000, checkpoint_every_steps=2, eval_every_steps=3)
    deadline = time.monotonic() + 200
    while not (workdir / "checkpoints" / "4").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    both[1].kill()
    killed_at = time.monotonic()
    first, _ = finish(both)
    return workdir, first, time.monotonic() - killed_at


def test_one_that_is_killed_ends_the_other(killed):
    _, first, seconds = killed
    assert "Another process of this run has gone" in one_line_error(first)
    assert seconds < 60


@pytest.mark.parametrize(
    ("topology", "batch"),
    [
        (
            {"processes": 1, "devices": 2, "mesh_fsdp": 1, "mesh_tensor": 2, "global_batch_size": 0},
            "16 rows a step in 4 parts",
        ),
        ({"processes": 2, "devices": 4, "mesh_fsdp": 4}, "16 rows a step"),
    ],
)
def test_goes_on_elsewhere(unbroken, tmp_path, topology, batch):
    """From the fourth step, on another mesh, other devices or processes: the same bits, then the same rows, losses."""
    workdir = tmp_path / "copy"
    shutil.copytree(unbroken, workdir, ignore=lambda folder, names: {str(n) for n in range(8, 25, 4)} & set(names))
    done = train(workdir, **LONG | topology)
    assert re.search(rf"Resuming at step 4 of 24.*{batch}\.$", done[0].stderr, re.MULTILINE)
    assert "step 24:" in done[0].stderr
    assert not any("step" in process.stderr for process in done[1:])  # one process speaks
    assert_as_saved(workdir, 4, topology["processes"])
    assert rows_of(workdir, topology["processes"]) == rows_of(unbroken, 1)[4:]
    assert_same(metrics_of(workdir), metrics_of(unbroken), rtol=1e-6)
    assert loading.load_model(workdir).step == 24


def assert_as_saved(workdir, step: int, processes: int):
    """What the processes began with together is a checkpoint, bit for bit."""
    items = {item: in_numpy(workdir / "checkpoints" / str(step) / item) for item in ("params", "opt_state")}
    saved = ocp.tree.to_flat_dict(items, sep="/")
    told = [pickle.loads((workdir / "told" / str(number) / "state").read_bytes()) for number in range(processes)]
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


def test_stopped_together(tmp_path):
    """A signal to one of two stops both after the same step, with a checkpoint of it; both end well."""
    both = start(tmp_path, processes=2, devices=4, num_train_steps=10_000, eval_every_steps=5000)
    while not (tmp_path / "checkpoints" / "2").exists():
        time.sleep(0.05)
    both[1].send_signal(signal.SIGTERM)
    done = finish(both)
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    [step] = re.findall(r"Stopped by another process at step (\d+): a checkpoint is saved", done[0].stderr)
    assert (tmp_path / "checkpoints" / step).exists()


def test_started_again_it_is_the_unbroken_run(killed, unbroken, tmp_path):
    """After a kill, both go on to the very bits of a run that nothing befell, which is as one of one process."""
    workdir, *_ = killed
    train(tmp_path, processes=2, devices=4, num_train_steps=9)
    ours, theirs = ([line for line in metrics_of(run) if "train_loss" in line][:9] for run in (tmp_path, unbroken))
    assert_same(ours, theirs, rtol=1e-6)
    saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    for step in range(saved, 7, -1):
        subprocess.run(["rm", "-rf", workdir / "checkpoints" / str(step)], check=True)
    train(workdir, processes=2, devices=4, num_train_steps=9)
    ours, theirs = (loading.load_model(folder).params for folder in (workdir, tmp_path))
    for one, other in zip(_leaves(ours), _leaves(theirs), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_folder_that_is_not_shared(tmp_path):
    """Said by the process that does not see it; the other does not wait for ever."""
    first, second = finish(start([tmp_path / "here", tmp_path / "there"], processes=2, devices=1))
    assert f"{tmp_path / 'there'} is not the folder that the first process" in one_line_error(second)
    assert "Another process of this run has gone" in one_line_error(first)
    assert not (tmp_path / "here" / "checkpoints").exists()


def test_flags_that_do_not_suffice(tmp_path):
    done = run(command("main", tmp_path, "--num_processes=2"))
    assert "--coordinator_address=HOST:PORT --num_processes=N --process_id=0..N-1" in one_line_error(done)


def _leaves(tree) -> list[np.ndarray]:
    return (
        [leaf for value in tree.values() for leaf in _leaves(value)] if isinstance(tree, dict) else [np.asarray(tree)]
    )
