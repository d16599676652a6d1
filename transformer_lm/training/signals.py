"""SIGTERM and Ctrl-C, while a run goes on."""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def signals_caught() -> Iterator[list[str]]:
    """Gives a list to which the name of a first SIGTERM or Ctrl-C is added; a second one acts as ever."""
    caught: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def catch(number, frame):
        del frame
        caught.append(signal.Signals(number).name)
        restore()

    for number in before:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        restore()
