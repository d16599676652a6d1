"""Two processes of four devices each as one run: real processes, real kills."""

import json
import os
import re
import signal
import socket
import subprocess
import time

import numpy as np
import pytest
from conftest import command, one_line_error, run

from transformer_lm.checkpoints import loading
from transformer_lm.training.reporter import SPEEDS

FIELDS = {
    "num_train_steps": 6, "log_every_steps": 1, "eval_every_steps": 3, "checkpoint_every_steps": 2,
    "keep_checkpoints": 3, "global_batch_size": 16, "num_heads": 2, "per_device_batch_size": 2, "mesh_fsdp": 2,
    "num_eval_steps": 3, "eval_per_device_batch_size": 2, "vocab_size": 800,
}  # fmt: skip


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
        line = command("main", place, *own * (processes > 1), **FIELDS | fields)
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


def assert_same(ours: list[dict], theirs: list[dict], **tolerance):
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(list(one.values()), list(other.values()), **tolerance)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The workdir of a run of one process of eight devices."""
    workdir = tmp_path_factory.mktemp("unbroken")
    train(workdir, processes=1, devices=8)
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


def test_goes_on_elsewhere(unbroken, tmp_path):
    """A checkpoint of eight devices in fsdp, on two in tensor parallel: the same rows, the same losses."""
    before = loading.load_model(unbroken)
    (tmp_path / "copy").mkdir()
    subprocess.run(["cp", "-r", f"{unbroken}/.", tmp_path / "copy"], check=True)
    for newer in ("4", "6"):
        subprocess.run(["rm", "-r", tmp_path / "copy" / "checkpoints" / newer], check=True)
    [done] = train(tmp_path / "copy", processes=1, devices=2, mesh_fsdp=1, mesh_tensor=2, global_batch_size=0)
    assert re.search(r"Resuming at step 2 of 6.*16 rows a step in 4 parts", done.stderr)
    assert_same(metrics_of(tmp_path / "copy"), metrics_of(unbroken), rtol=1e-5)
    after = loading.load_model(tmp_path / "copy")
    assert after.step == before.step == 6


def test_two_processes_are_as_one(unbroken, tmp_path):
    done = train(tmp_path, processes=2, devices=4)
    assert_same(metrics_of(tmp_path), metrics_of(unbroken), rtol=1e-6)
    assert "step 6:" in done[0].stderr
    assert "step" not in done[1].stderr  # one process speaks


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


def test_started_again_it_is_the_unbroken_run(killed, tmp_path):
    """After a kill, both go on to the very bits of a run that nothing befell."""
    workdir, *_ = killed
    train(tmp_path, processes=2, devices=4, num_train_steps=9)
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
