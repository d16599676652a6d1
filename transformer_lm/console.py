"""What a person sees while a command runs: log lines and progress bars, on standard error."""

import contextlib
import io
import logging as python_logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import rich.console
import rich.progress
from absl import logging

CONSOLE = rich.console.Console(stderr=True)


class _LineHandler(python_logging.Handler):
    """Prints a log record as one line, above a progress bar where there is one; only a terminal may wrap it."""

    def emit(self, record: python_logging.LogRecord):
        try:
            moment = time.strftime("%H:%M:%S", time.localtime(record.created))
            level = "" if record.levelno <= python_logging.INFO else f"{record.levelname}: "
            text = record.getMessage() if _is_ours(record) else " ".join(record.getMessage().split())
            stack = f"\n{python_logging.Formatter().formatException(record.exc_info)}" if record.exc_info else ""
            CONSOLE.print(f"{moment} {level}{text}{stack}", soft_wrap=True, markup=False, highlight=False)
        except Exception:
            self.handleError(record)


def set_up(debug: bool):
    """Prepares what is printed: in UTF-8 whatever the locale, this package's log lines and errors of the libraries.

    Stack traces, of threads and of errors that libraries log before they raise them, are shown with `debug` alone.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    handler = _LineHandler()
    handler.addFilter(_is_ours_or_error if debug else _is_worth_showing)
    for logger in (logging.get_absl_logger(), python_logging.getLogger()):
        logger.handlers = [handler]
    logging.get_absl_logger().propagate = False
    logging.set_verbosity(logging.INFO)
    python_logging.getLogger("jax").setLevel(python_logging.WARNING)
    python_logging.raiseExceptions = debug
    if not debug:
        threading.excepthook = lambda failed: logging.debug("A thread failed: %r", failed.exc_value)
        sys.unraisablehook = lambda failed: logging.debug("An error was ignored: %r", failed.exc_value)


def _is_ours(record: python_logging.LogRecord) -> bool:
    return os.path.abspath(record.pathname).startswith(os.path.dirname(os.path.abspath(__file__)) + os.sep)


def _is_ours_or_error(record: python_logging.LogRecord) -> bool:
    return _is_ours(record) or record.levelno >= python_logging.ERROR


def _is_worth_showing(record: python_logging.LogRecord) -> bool:
    return _is_ours_or_error(record) and not record.exc_info and record.name != "asyncio"


@contextlib.contextmanager
def progress(title: str) -> Iterator[Callable[[int], None]]:
    """A progress line that counts characters; gives the function to report the count with."""
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.SpinnerColumn(),
        rich.progress.TextColumn("{task.completed:,.0f} characters"),
        rich.progress.TimeElapsedColumn(),
    )
    with rich.progress.Progress(*columns, console=CONSOLE, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda count: bar.update(task, completed=count)


@contextlib.contextmanager
def training_progress(first_step: int, last_step: int) -> Iterator[Callable[[int, str], None]]:
    """A progress bar of training steps with time left; gives the function to report a step and a text with."""
    columns = (
        rich.progress.TextColumn("step {task.completed:,}/{task.total:,}"),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("{task.description}"),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("left"),
        rich.progress.TimeRemainingColumn(elapsed_when_finished=False),
    )
    with rich.progress.Progress(*columns, console=CONSOLE) as bar:
        task = bar.add_task("", total=last_step, completed=first_step)
        yield lambda step, text: bar.update(task, completed=step, description=text)


@contextlib.contextmanager
def only_our_lines() -> Iterator[None]:
    """What libraries write to standard error themselves goes nowhere."""
    CONSOLE.file = sys.stderr
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
            yield
    finally:
        CONSOLE.file = None  # whatever standard error is


def quiet_datatrove():
    """Leaves datatrove's log lines to the files of its tasks, but for warnings."""
    from loguru import logger

    logger.remove()
    logger.add(lambda line: CONSOLE.print(line, soft_wrap=True, markup=False, highlight=False, end=""), level="WARNING")
