"""What tells a run to stop: SIGTERM, Ctrl-C, a notice of preemption."""

import concurrent.futures
import contextlib
import ctypes
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

LISTEN_SECONDS = 0.1
SAME_SECONDS = 1.0  # in which more signals are the first one again: of a terminal or a service, and of a script in it

Result = TypeVar("Result")


class Stopped(Exception):  # noqa: N818  (no error)
    """A signal came while something was being waited for."""


class Signals:
    """Remembers the first SIGTERM or Ctrl-C; a later one ends the process at once, whatever it is doing.

    Attributes:
      caught: the first signal's name, or another reason to stop; None before.
    """

    def __init__(self):
        self.caught: str | None = None
        self.ending = threading.Timer(SAME_SECONDS, _end_by_signals)
        self.ending.daemon = True

    def catch(self, number: int, frame: object):
        """The handler of the first signal."""
        del frame
        for handled in HANDLED:
            signal.signal(handled, signal.SIG_IGN)
        self.tell(signal.Signals(number).name)
        with contextlib.suppress(RuntimeError):  # another came within microseconds, and has started it
            self.ending.start()

    def tell(self, reason: str):
        """There is a reason to stop, the first of which is remembered. A signal may still come."""
        self.caught = self.caught or reason

    def listening(self, work: Callable[[], Result]) -> Result:
        """What `work` returns. Raises Stopped as soon as there is a signal; the work goes on in its thread.

        For what takes long and may be given up, such as compiling and evaluating: a handler in Python runs only when
        the main thread is not inside a library.
        """
        future = begun(work)
        while not future.done():
            if self.caught:
                raise Stopped
            concurrent.futures.wait([future], timeout=LISTEN_SECONDS)
        return future.result()


def begun(work: Callable[[], Result]) -> concurrent.futures.Future[Result]:
    """What `work` will return or raise, in a thread of its own, which does not hold up the process's end."""
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def run():
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


HANDLED = (signal.SIGTERM, signal.SIGINT)


def _end_by_signals():
    """Lets signals end the process, whatever its main thread is doing: Python changes handlers in that thread alone."""
    for handled in HANDLED:
        ctypes.CDLL(None).signal(handled, ctypes.c_void_p(0))  # SIG_DFL


@contextlib.contextmanager
def signals_caught() -> Iterator[Signals]:
    """Catches the first signal within; outside the main thread, where none can be caught, remembers nothing."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, signals.catch) for number in HANDLED}
    try:
        yield signals
    finally:
        signals.ending.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
