"""Which files a path or a pattern names, on this machine or wherever fsspec reaches.

fsspec's own listing of local files takes links for neither files nor folders, leaves broken ones out, and passes over
what it may not read; here nothing but folders is left out. A path that exists is that file, whatever its name holds,
and the name of a folder that exists means that folder.
"""

import contextlib
import errno
import fnmatch
import glob
import os
import re
import stat
from collections.abc import Iterator

import fsspec
from absl import logging

from transformer_lm.errors import UserError

EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3", "http": "http", "https": "http"}
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*(://|::)")


def list_files(pattern: str) -> tuple[fsspec.AbstractFileSystem, list[dict]]:
    """The files that a path, URL or glob names (`**` included), in the order of their names.

    Returns:
      their file system, and fsspec's facts on each: name, size, and what its version is known by; for a link these are
      the facts of the file that it leads to.

    Raises:
      UserError: a link leads nowhere, a package is missing, or what matches is no file.
    """
    pattern = os.path.expanduser(pattern.removeprefix("file://"))
    if os.path.lexists(pattern) or not _URL.match(pattern):
        found = [_facts(path) for path in sorted(set(_matching(pattern)))]
        return fsspec.filesystem("file"), [info for info in found if info]
    protocol = pattern.partition("://")[0]
    try:
        files, path = fsspec.core.url_to_fs(pattern)
    except (ImportError, ValueError) as error:
        if protocol not in EXTRAS:
            raise UserError(f"{pattern}: {error}") from error
        command = f"in the checkout, pip install -c constraints.txt -e '.[{EXTRAS[protocol]}]'"
        raise UserError(f"Reading {pattern} needs another package: {command}.") from error
    if re.search(r"[*?\[]", path) and not files.isfile(path):  # the full name of a file may look like a pattern
        found = files.glob(pattern, detail=True)
    else:
        found = {}
        with contextlib.suppress(FileNotFoundError):  # but not what is in the way: no network, no permission
            found = {path: files.info(path)}
    return files, [found[path] for path in sorted(found) if found[path]["type"] != "directory"]


def _matching(pattern: str) -> Iterator[str]:
    """The local paths that a path or pattern names, absolute."""
    path = os.path.join(os.getcwd(), pattern.removeprefix("./"))
    if not os.path.lexists(path):
        yield from _below("/", [part for part in path.split("/") if part], set())
    elif os.path.isdir(path):
        raise UserError(f"{path} is a folder; name the files in it, like {os.path.join(path, '*')}.")
    else:
        yield path


def _below(path: str, parts: list[str], entered: set[tuple[str, int]]) -> Iterator[str]:
    """The paths below a folder whose names match the parts of a pattern; of a folder's name that exists, it alone.

    `entered` has the folders that a ** has been in, and how many parts were left then: links may lead there again.
    """
    if not parts:
        yield path
        return
    if not os.path.isdir(path):
        if not os.path.exists(path):
            logging.warning("%s is a link to nowhere; if it led to a folder, the files there are missing.", path)
        return
    name, rest = parts[0], parts[1:]
    literal = os.path.join(path, name)
    if name == "**":
        here = os.path.realpath(path)
        if (here, len(parts)) in entered:
            logging.warning("%s leads to a folder that has been read, %s: not entered again.", path, here)
            return
        entered.add((here, len(parts)))
        yield from _below(path, rest or ["*"], entered)
        for child in _children(path):
            if os.path.isdir(child) or not os.path.exists(child):
                yield from _below(child, parts, entered)
    elif not glob.has_magic(name) or ("[" in name and os.path.lexists(literal)) or (rest and os.path.isdir(literal)):
        if os.path.lexists(literal):
            yield from _below(literal, rest, entered)
    else:
        matches = re.compile(fnmatch.translate(name)).match
        for child in _children(path):
            if matches(os.path.basename(child)):
                yield from _below(child, rest, entered)


def _children(folder: str) -> list[str]:
    """What lies in a folder, links included."""
    return sorted(os.path.join(folder, name) for name in os.listdir(folder))


def _facts(path: str) -> dict | None:
    """Name, size and time of change of a file, or of what a link leads to; None for a folder."""
    try:
        status = os.stat(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP) or not os.path.islink(path):
            raise
        raise UserError(f"{path} is a link to {os.readlink(path)}, which is not there; mend or remove it.") from error
    if stat.S_ISDIR(status.st_mode):
        return None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is a pipe, socket or device; documents are read more than once, from a file.")
    return {"name": path, "type": "file", "size": status.st_size, "mtime": status.st_mtime}
