"""What is said when something is wrong: the exception for what a user can mend, and one line for anything else."""

import contextlib
import errno
import re
from collections.abc import Iterator

MAX_CHARS = 600  # of the text of an error: some libraries' run to pages


class UserError(Exception):
    """Something wrong in a config, a file or a command. Its text is one line: what, with which value, what to do."""


@contextlib.contextmanager
def stage(doing: str, lower: str = "") -> Iterator[None]:
    """Names what is done inside, for the line of an error that nobody foresaw; of nested stages the innermost counts.

    Args:
      doing: as in "training", which becomes "while training".
      lower: what takes less memory when it is lower, for when memory is exhausted.
    """
    try:
        yield
    except Exception as error:
        for name, value in (("stage", doing), ("lower", lower)):
            if value and not hasattr(error, name):
                setattr(error, name, value)
        raise


@contextlib.contextmanager
def writing(output: str) -> Iterator[None]:
    """Whatever goes wrong inside, but for a UserError, becomes one: that the output cannot be written, and why."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a full disk, a missing permission, whatever a library raises
        raise UserError(f"{output} cannot be written: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """What an error says, in one line, with the stage where it happened unless the user can mend it as it is."""
    text = " ".join(str(error).split())
    text = re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)  # what terminals obey
    text = text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]}..."
    if isinstance(error, UserError):
        return text
    doing = f" while {error.stage}" if hasattr(error, "stage") else ""
    if is_out_of_memory(error):
        lower = getattr(error, "lower", "")
        return f"memory is exhausted{doing}{f'; lower {lower}' if lower else ''} ({text or type(error).__name__})."
    if isinstance(error, FileExistsError | NotADirectoryError) and error.filename:  # from making a folder
        return f"{error.filename}: a file or a broken link is where a folder must be{doing}"
    if isinstance(error, OSError) and text:  # a full disk, a missing permission, a lost network: nothing to debug
        return f"{text}{doing}"
    text = f": {text}" if text else ""
    return f"{type(error).__name__}{doing}{text}; run again with --debug for the stack trace."


def may_not_be_written(error: OSError) -> bool:
    """Whether an error says that a place may only be read."""
    return error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a want of memory of the machine or of a device."""
    while error is not None:
        text = str(error)
        if isinstance(error, MemoryError) or "std::bad_alloc" in text or "Cannot allocate memory" in text:
            return True
        if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in text:
            return True
        error = error.__cause__ or error.__context__
    return False
