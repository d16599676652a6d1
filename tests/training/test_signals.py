"""Signals: what is waited for is given up at once, and its result or error comes back as if nothing were between."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from transformer_lm.training.signals import SAME_SECONDS, Stopped, signals_caught


def test_result_and_error_come_back():
    with signals_caught() as signals:
        assert signals.listening(lambda: 7) == 7
        with pytest.raises(TimeoutError, match="mine"):
            signals.listening(lambda: (_ for _ in ()).throw(TimeoutError("mine")))
    assert signals.caught is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_given_up_at_once(number):
    """Also in a library that does not come back to Python for a long time, as a compiler."""
    before = signal.getsignal(number)
    with signals_caught() as signals:
        threading.Timer(0.2, os.kill, [os.getpid(), number]).start()
        start = time.monotonic()
        with pytest.raises(Stopped):
            signals.listening(lambda: time.sleep(30))
        assert time.monotonic() - start < 5
        assert signals.caught == number.name
    assert signal.getsignal(number) is before


def test_the_same_signal_from_two_sides_is_one():
    """Of a terminal, say, and of a script in it that hands it on."""
    with signals_caught() as signals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
    assert signals.caught == "SIGINT"


def test_a_signal_within_the_handler_of_another():
    """A few microseconds apart the second is handled within the first, before that has changed the handlers."""
    with signals_caught() as signals:
        begin = signals.ending.start

        def start():
            signals.ending.start = begin
            signals.catch(signal.SIGINT, None)  # comes here
            begin()

        signals.ending.start = start
        os.kill(os.getpid(), signal.SIGTERM)
    assert signals.caught == "SIGTERM"


def test_a_later_signal_ends_the_process_at_once():
    """Even where no Python runs in the main thread: the handler is the system's own again."""
    code = (
        "import ctypes\n"
        "from transformer_lm.training.signals import signals_caught\n"
        "library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)\n"
        "library.pthread_mutex_init(mutex, None)\n"
        "library.pthread_mutex_lock(mutex)\n"
        "with signals_caught() as signals:\n"
        "    print('ready', flush=True)\n"
        "    while not signals.caught: pass\n"
        "    print('caught', flush=True)\n"
        "    library.pthread_mutex_lock(mutex)\n"  # waits for ever, and no handler ends the wait
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "caught\n"
    time.sleep(SAME_SECONDS + 0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == -signal.SIGTERM
