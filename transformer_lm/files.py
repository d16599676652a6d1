"""Files that are whole or not there, local or remote."""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import resource
import stat
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epath

from transformer_lm.errors import UserError

CACHE_GB = 100.0  # of copies of remote files, unless TRANSFORMER_LM_CACHE_GB says otherwise
CACHE_SECONDS = 24 * 3600  # a copy that was used since then is not removed
MAX_FILES = 10_240  # open at once, where the system names no limit but has one, as macOS
APPEAR_SECONDS = 0.2  # between two looks for what another machine has written
MAX_JSON_BYTES = 64 << 20  # the longest that is written here, an index of a hundred thousand tensors, has 10 MB


def write_atomically(path: os.PathLike | str, content: bytes):
    """Writes a file, local or remote, so that a reader, or a crash, sees the old content or the new."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(path):
        path.write_bytes(content)  # an object store shows an object when it is whole
    else:
        write_file_atomically(path, lambda temporary: Path(temporary).write_bytes(content))


def write_file_atomically(path: os.PathLike | str, write: Callable[[str], Any]) -> Any:
    """As `write_atomically`, for a library that writes to the name of a local file; returns what `write` does."""
    path = epath.Path(path)
    folder = cache_folder() if is_remote(path) else Path(path).parent
    temporary = folder / f"{path.name}.tmp{uuid.uuid4().hex}"
    try:
        result = write(str(temporary))
        if is_remote(path):
            epath.Path(temporary).copy(path, overwrite=True)
        else:
            sync(temporary)
            temporary.replace(path)
            with contextlib.suppress(OSError):  # some file systems do not sync folders
                sync(folder)
        return result
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: os.PathLike | str):
    """Returns when a local file, or the names in a folder, survive a power cut."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def read_at_most(path: epath.Path, limit: int) -> bytes | None:
    """The content of a file that may be anybody's; None if it is longer, or no file but a folder, a device, a pipe."""
    if is_remote(path):
        return None if path.is_dir() or path.stat().length > limit else path.read_bytes()
    if not stat.S_ISREG(os.stat(path).st_mode):
        return None
    with open(path, "rb") as file:
        content = file.read(limit + 1)
    return content if len(content) <= limit else None


def is_file(path: epath.Path) -> bool:
    """Whether a path is a file's: not a folder's, nor that of a pipe or a device, of which a reader finds no end."""
    return path.exists() and not path.is_dir() if is_remote(path) else os.path.isfile(path)


def read_json(path: epath.Path) -> dict:
    """The object in a JSON file that may be anybody's; raises UserError if it is none."""
    content = read_at_most(path, MAX_JSON_BYTES)
    return json_object(b"null" if content is None else content, path)


def json_object(content: bytes, path: os.PathLike | str) -> dict:
    """The object that JSON from a file is; raises UserError if it is none, or nested too deeply to be read."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON file ({type(error).__name__}).") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object of at most {MAX_JSON_BYTES} bytes.")
    return found


def read_json_lines(path: epath.Path) -> list[dict]:
    """The objects in a file's lines; a line that is none, as a power cut leaves it, counts for nothing."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(UserError):
            found.append(json_object(line, path))
    return found


def json_bytes(content: Any, indent: int | None = 1) -> bytes:
    """JSON that people read, in UTF-8; half a surrogate pair, which UTF-8 cannot hold, is escaped."""
    return json.dumps(content, ensure_ascii=False, indent=indent).encode(errors="backslashreplace")


def write_json(path: Path, content: dict):
    """A JSON file that people read."""
    path.write_bytes(json_bytes(content, indent=2) + b"\n")


def local_copy(path: os.PathLike | str, size: int | None = None, version: Any = None) -> Path:
    """The file itself where it is local; else a copy in the cache, for libraries that read local files alone.

    Args:
      path: of the file.
      size, version: its bytes, and what is another when its content is; asked of the object store where not given.
    """
    if not is_remote(path):
        return Path(path)
    path = epath.Path(path)
    if size is None:
        found = path.stat()
        size, version = found.length, found.mtime
    name = hashlib.sha256(f"{path} {size} {version}".encode()).hexdigest()[:16]
    copy = _copies() / name / path.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    with (copy.parent / ".lock").open("w") as lock:  # of this machine's processes one copies, the others wait
        with contextlib.suppress(OSError):  # a file system without locks; the copy is whole in any case
            fcntl.flock(lock, fcntl.LOCK_EX)
        if copy.exists():
            copy.touch()  # used now
        else:
            _make_room(size)
            write_file_atomically(copy, lambda temporary: path.copy(temporary, overwrite=True))
    return copy


def _copies() -> Path:
    return cache_folder() / "copies"


_room = 0.0  # bytes that this process may add before it looks through the copies again


def _make_room(size: int):
    """Removes copies that were not used for a day or more, the oldest first, until a new one fits the cache.

    What a run reads may be more than the limit: then it is what its disk has to hold, and nothing of it is removed.
    """
    global _room
    limit = _cache_bytes()
    if size > _room:
        total, used = size, []
        for path in _copies().glob("*/*"):
            with contextlib.suppress(FileNotFoundError):  # another process has removed or renamed it
                found = path.stat()
                total += found.st_size
                used.append((found.st_mtime, found.st_size, path))
        for when, length, path in sorted(used):
            if total <= limit or time.time() - when < CACHE_SECONDS:
                break
            path.unlink(missing_ok=True)
            total -= length
        _room = max(limit - total + size, limit / 20)  # until one looks again
    _room -= size


def forget_unused(folder: Path, days: int):
    """Removes what lies in a folder of the cache and was not read for so many days; looks through it once a day."""
    looked, now = folder / ".looked-through", time.time()
    with contextlib.suppress(OSError):  # there is no such folder yet, or it may only be read
        if looked.exists() and now - looked.stat().st_mtime < 24 * 3600:
            return
        looked.touch()
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process does the same
                found = path.stat()
                if now - max(found.st_atime, found.st_mtime) > 24 * 3600 * days:
                    path.unlink()


def _cache_bytes() -> float:
    value = os.environ.get("TRANSFORMER_LM_CACHE_GB", str(CACHE_GB))
    if not re.fullmatch(r"\d+(\.\d+)?", value):
        raise UserError(f"TRANSFORMER_LM_CACHE_GB={value!r} must be a number of gigabytes.")
    return float(value) * 1e9


def cache_folder() -> Path:
    """Where copies of remote files lie: TRANSFORMER_LM_CACHE, or a folder in the user's cache."""
    folder = cache_place()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cache_place() -> Path:
    """As `cache_folder`, which may not be there yet."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "transformer-lm-japanese"
    return Path(os.environ.get("TRANSFORMER_LM_CACHE") or default).expanduser()


def allow_open_files() -> float:
    """Lets this process have as many files and connections open as it may at all; returns how many."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if now != resource.RLIM_INFINITY:
        with contextlib.suppress(ValueError, OSError):
            wanted = max(now, MAX_FILES) if most == resource.RLIM_INFINITY else most
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
    now, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return math.inf if now == resource.RLIM_INFINITY else now


def utf8_name(folder: os.PathLike | str) -> str:
    """A folder by a name in UTF-8, as ArrayRecord needs it: its own, or where that is not, that of a link to it."""
    folder = os.fspath(folder)
    if folder == folder.encode(errors="replace").decode():
        return folder
    folder = os.path.abspath(folder)
    link = cache_folder() / f"folder-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}"
    with contextlib.suppress(FileExistsError):
        link.symlink_to(folder)
    return str(link)


def make_own_folder(folder: epath.Path):
    """Makes a folder all of whose content may be replaced; refuses a link, which could lead to anything."""
    if not is_remote(folder) and os.path.islink(folder):
        raise UserError(
            f"{folder} is a link, but has to be a folder of its own: what lies in it is replaced. Remove it."
        )
    folder.mkdir(parents=True, exist_ok=True)


def remove(path: epath.Path):
    """Removes a file, a link, or a folder with all that is in it."""
    if path.is_dir() and (is_remote(path) or not os.path.islink(path)):
        path.rmtree()
    else:
        path.unlink()


def children(folder: epath.Path) -> list[epath.Path]:
    """What lies in a folder; nothing where there is none, as in an object store before its first object."""
    if is_remote(folder):
        return [folder / name for name in sizes_in(folder)]  # as it is now
    return list(folder.iterdir()) if folder.is_dir() else []


def sizes_in(folder: epath.Path) -> dict[str, int]:
    """{name: bytes} of the files in a folder, of an object store by its listing alone."""
    if is_remote(folder):
        import fsspec  # here, since it takes a while

        files, path = fsspec.core.url_to_fs(os.fspath(folder))
        files.invalidate_cache()
        found = files.ls(path, detail=True) if files.exists(path) else []
        names = {info["name"].rstrip("/"): info["size"] for info in found}
        names.pop(path.rstrip("/"), None)  # a mark that the folder is there
        return {name.rpartition("/")[2]: size for name, size in names.items()}
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries}
    return {}


def appears(path: epath.Path, seconds: float) -> bool:
    """Whether a path is there, or comes within so many seconds: file systems may show late what others have written."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(APPEAR_SECONDS)
    return True


def path_of(path: os.PathLike | str) -> epath.Path:
    """A path as somebody wrote it; raises UserError where it is on a kind of storage that nobody here knows."""
    try:
        return epath.Path(path)
    except KeyError as error:
        raise UserError(f"{path}: {error} is not known here; name a folder, or gs:// or s3://.") from error


def absolute(path: os.PathLike | str) -> epath.Path:
    """A path that means the same to every process; ~ is the user's home."""
    return path_of(path) if is_remote(path) else epath.Path(os.path.abspath(os.path.expanduser(path)))


def is_remote(path: os.PathLike | str) -> bool:
    """Whether a path is a URL like gs://bucket/folder."""
    return "://" in os.fspath(path)
