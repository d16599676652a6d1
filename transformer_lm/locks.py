"""Locks between processes, and between machines that share a folder or a bucket.

On a file system the kernel holds the lock (flock) and lets go of it when the process ends, however it ends. An object
store has no locks: there the holder writes its object again and again, and one that stays unchanged for
`DEAD_SECONDS` counts as left behind by a process that has ended.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from absl import logging
from etils import epath

from transformer_lm.errors import UserError
from transformer_lm.files import is_remote, write_atomically

BEAT_SECONDS = 10.0  # between two writes of a remote lock
DEAD_SECONDS = 3 * BEAT_SECONDS
SETTLE_SECONDS = 2.0  # after which the last of several that wrote at once stands in the object
RETRY_SECONDS = 0.5
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)  # file systems without flock


def exclusive(path: os.PathLike | str, what: str) -> contextlib.AbstractContextManager[None]:
    """Holds a lock; raises UserError, which names the holder, where another process has it.

    Args:
      path: the lock's file or object, local or remote; its folder is made.
      what: what is locked, for the error.
    """
    return _hold(path, what, wait=False)


def waiting_for(path: os.PathLike | str, what: str) -> contextlib.AbstractContextManager[None]:
    """Holds a lock, waiting while another process has it; says so in one line of the log."""
    return _hold(path, what, wait=True)


@contextlib.contextmanager
def _hold(path: os.PathLike | str, what: str, wait: bool) -> Iterator[None]:
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = _HeartbeatLock(path) if is_remote(path) else _FileLock(path)
    told = False
    while (holder := lock.acquire()) is not None:
        if not wait:
            raise UserError(f"{what} is in use by {holder}; wait until that has ended, or stop it.")
        if not told:
            logging.info("%s is in use by %s: waiting.", what, holder)
            told = True
        time.sleep(RETRY_SECONDS)
    try:
        yield
    finally:
        lock.release()


def _describe(content: str) -> str:
    """Who wrote a lock, as errors name it."""
    try:
        holder = json.loads(content)
        return f"process {holder['process']} on {holder['host']} (since {holder['since']})"
    except (ValueError, TypeError, KeyError, RecursionError):
        return "another process"


def _signature() -> dict:
    return {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


class _FileLock:
    """A lock of the kernel on a local or network file system."""

    def __init__(self, path: epath.Path):
        self._path = path
        self._instead: _HeartbeatLock | None = None

    def acquire(self) -> str | None:
        """None when the lock is held now, else who holds it."""
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            if os.path.islink(self._path):
                raise UserError(
                    f"{self._path} is a link, but has to be a file: it is written to. Remove it."
                ) from error
            raise
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            content = os.read(self._file, 4096).decode(errors="replace")
            os.close(self._file)
            if error.errno in NO_LOCKS:
                self._instead = self._instead or _HeartbeatLock(self._path)
                return self._instead.acquire()
            if isinstance(error, BlockingIOError):
                return _describe(content)
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samefile(self._file, self._path):
                os.ftruncate(self._file, 0)
                os.write(self._file, json.dumps(_signature()).encode())
                return None
        os.close(self._file)  # the one who held it has removed the file meanwhile
        return self.acquire()

    def release(self):
        """Lets others in."""
        if self._instead:
            self._instead.release()
            return
        with contextlib.suppress(OSError):  # the folder may be gone
            os.unlink(self._path)
        os.close(self._file)


class _HeartbeatLock:
    """An object that its holder keeps changing."""

    def __init__(self, path: epath.Path):
        self._path = path
        self._token = uuid.uuid4().hex
        self._told = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def acquire(self) -> str | None:
        """None when the lock is held now, else who holds it; takes DEAD_SECONDS where a lock was left behind."""
        before = self._read()
        if before and not self._told:
            logging.info("%s names %s: seeing whether that still runs.", self._path, _describe(before))
            self._told = True
        deadline = time.monotonic() + DEAD_SECONDS
        while before and time.monotonic() < deadline:
            time.sleep(min(RETRY_SECONDS, BEAT_SECONDS))
            if (now := self._read()) != before:
                if now:
                    return _describe(now)
                before = now
        self._write(0)
        time.sleep(SETTLE_SECONDS)
        if self._token not in (now := self._read()):
            return _describe(now)
        self._thread.start()
        return None

    def _read(self) -> str:
        try:
            return self._path.read_bytes().decode(errors="replace")
        except FileNotFoundError:
            return ""

    def _write(self, beat: int):
        content = _signature() | {"token": self._token, "beat": beat}
        write_atomically(self._path, json.dumps(content).encode())  # on a file system without locks nobody reads a half

    def _beat(self):
        beat = 0
        while not self._ended.wait(BEAT_SECONDS):
            beat += 1
            try:
                if (now := self._read()) and self._token not in now:
                    self._lose(now)
                self._write(beat)
            except Exception as error:  # a network that is away for a moment
                logging.warning("The lock %s could not be written again: %s", self._path, error)

    def _lose(self, now: str):
        """Ends the process: it was silent for so long that another, rightly, goes on with what it was at."""
        os.write(2, f"error: {_describe(now)} has taken the lock {self._path}, since this one was silent.\n".encode())
        os._exit(1)

    def release(self):
        """Lets others in."""
        self._ended.set()
        self._thread.join()
        if self._token in self._read():
            self._path.unlink(missing_ok=True)
