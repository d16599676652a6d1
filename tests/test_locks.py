"""Locks: the second process is told who has it, a dead one's lock is no obstacle, whatever holds the lock."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from transformer_lm import locks
from transformer_lm.errors import UserError

HOLD = "import sys, time\nfrom transformer_lm import locks\nlocks.BEAT_SECONDS = 0.1\nlocks.SETTLE_SECONDS = 0.05\n" + (
    "with locks.{kind}(sys.argv[1], 'the workdir'):\n    print('held', flush=True)\n    time.sleep(60)\n"
)


@pytest.fixture(params=["local", "remote"])
def lock_path(request, tmp_path, monkeypatch):
    """A file that the kernel locks, and one that is treated as an object store's."""
    if request.param == "remote":
        monkeypatch.setattr(locks, "is_remote", lambda path: True)
        monkeypatch.setattr(locks, "BEAT_SECONDS", 0.1)
        monkeypatch.setattr(locks, "DEAD_SECONDS", 0.6)
        monkeypatch.setattr(locks, "SETTLE_SECONDS", 0.05)
    return tmp_path / "folder" / "run.lock"


def hold(lock_path, kind="exclusive"):
    """A process that holds the lock."""
    code = HOLD.format(kind=kind)
    if locks.is_remote(lock_path):
        code = code.replace("import locks\n", "import locks\nlocks.is_remote = lambda path: True\n")
    process = subprocess.Popen([sys.executable, "-c", code, lock_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_second_is_refused_by_name(lock_path):
    process = hold(lock_path)
    told = rf"the run is in use by process {process.pid} on {os.uname().nodename}"
    with pytest.raises(UserError, match=told), locks.exclusive(lock_path, "the run"):
        pass
    process.kill()
    process.wait()
    with locks.exclusive(lock_path, "the run"):  # SIGKILL left the file, and no lock
        assert lock_path.exists()
    assert not lock_path.exists()


def test_nobody_reads_a_half_of_it(tmp_path, monkeypatch):
    """On a file system without locks an empty file would look as if nobody held it."""
    monkeypatch.setattr(locks, "is_remote", lambda path: True)
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.0001)
    monkeypatch.setattr(locks, "SETTLE_SECONDS", 0.01)
    with locks.exclusive(tmp_path / "run.lock", "the run"):
        beats = {json.loads((tmp_path / "run.lock").read_bytes())["beat"] for _ in range(3000)}
    assert len(beats) > 3


def test_who_was_silent_too_long_ends(tmp_path):
    """Another process has rightly taken the lock meanwhile, and keeps it."""
    path = tmp_path / "run.lock"
    code = HOLD.format(kind="exclusive").replace("import locks\n", "import locks\nlocks.is_remote = lambda _: True\n")
    process = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    others = json.dumps({"host": "b", "process": 7, "since": "now", "token": "other"})
    while process.poll() is None:  # again, should it have been about to write
        (tmp_path / "temporary").write_text(others)
        (tmp_path / "temporary").replace(path)
        time.sleep(0.3)
    assert process.returncode == 1
    assert process.stderr.read().decode().startswith("error: process 7 on b (since now) has taken the lock")
    assert path.read_text() == others


def test_second_waits(lock_path):
    process = hold(lock_path)
    threading.Timer(0.3, process.send_signal, [signal.SIGKILL]).start()
    start = time.monotonic()
    with locks.waiting_for(lock_path, "the rows"):
        assert time.monotonic() - start >= 0.3
    process.wait()


def test_one_of_many_at_a_time(tmp_path):
    """Threads that lock, unlock and unlink at once: never two inside."""
    inside, seen = [], []

    def work():
        for _ in range(20):
            with locks.waiting_for(tmp_path / "lock", "it"):
                inside.append(1)
                seen.append(len(inside))
                inside.pop()

    locks_before, locks.RETRY_SECONDS = locks.RETRY_SECONDS, 0.001
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    locks.RETRY_SECONDS = locks_before
    assert seen == [1] * 80


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b'{"host": 1}', b"[" * 5000])
def test_whatever_the_file_holds(tmp_path, content):
    path = tmp_path / "lock"
    path.write_bytes(content)
    with locks.exclusive(path, "it"):
        pass


def test_a_link_is_not_followed(tmp_path):
    """In somebody else's workdir it could lead to any file, which would be written to."""
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "run.lock").symlink_to(tmp_path / "mine")
    with (
        pytest.raises(UserError, match=r"run\.lock is a link, but has to be a file"),
        locks.exclusive(tmp_path / "run.lock", "x"),
    ):
        pass
    assert (tmp_path / "mine").read_text() == "precious"
