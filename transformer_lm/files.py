"""Files that are whole or not there."""

import os

from etils import epath


def write_atomically(path: os.PathLike | str, content: bytes):
    """Writes a file, local or remote, so that a reader, or a crash, sees the old content or the new."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)
