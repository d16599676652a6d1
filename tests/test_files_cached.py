"""Copies of remote files in the cache of a machine: what is removed for new ones, and what is not."""

import os
import threading
import time

import pytest

from transformer_lm import files

DAY = 24 * 3600


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of 1,000 bytes with a copy of 300 for each of four days, and somebody's own old file."""
    monkeypatch.setenv("TRANSFORMER_LM_CACHE", str(tmp_path))
    monkeypatch.setenv("TRANSFORMER_LM_CACHE_GB", "0.000001")
    monkeypatch.setattr(files, "_room", 0.0)
    for days in range(4):
        copy = tmp_path / "copies" / f"version{days}" / "rows"
        copy.parent.mkdir(parents=True)
        copy.write_bytes(b"x" * 300)
        os.utime(copy, (time.time() - (days + 0.5) * DAY,) * 2)
    (tmp_path / "mine").write_bytes(b"x" * 5000)
    os.utime(tmp_path / "mine", (0, 0))
    return tmp_path


def days_left(cache) -> list[int]:
    return [days for days in range(4) if (cache / "copies" / f"version{days}" / "rows").exists()]


def test_room_is_made_of_old_copies_alone(cache):
    files._make_room(100)
    assert days_left(cache) == [0, 1, 2]
    files._make_room(300)
    assert days_left(cache) == [0, 1]
    files._make_room(5000)
    assert days_left(cache) == [0]  # used within a day: then it is what the disk has to hold
    assert (cache / "mine").exists()


def test_the_cache_is_not_looked_through_for_each_copy(cache, monkeypatch):
    looked = []
    copies = files._copies
    monkeypatch.setattr(files, "_copies", lambda: looked.append(1) or copies())
    for _ in range(100):
        files._make_room(1)
    assert len(looked) < 15


def test_copies_that_others_remove_meanwhile(cache):
    """Or rename, as whoever writes one does at its end."""
    ended = threading.Event()

    def write():
        for number in range(10**9):
            temporary = cache / "copies" / f"version{number % 4}" / f"rows.tmp{number}"
            temporary.write_bytes(b"")
            temporary.replace(cache / "copies" / "version0" / "rows")
            if ended.is_set():
                return

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(300):
            files._room = 0.0
            files._make_room(1)
    finally:
        ended.set()
        writer.join()


def test_an_empty_variable_is_none(monkeypatch):
    monkeypatch.delenv("TRANSFORMER_LM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert files.cache_place() == files.Path("~/.cache/transformer-lm-japanese").expanduser()


def test_what_nobody_reads_goes_looked_for_once_a_day(tmp_path):
    """By when it was read or written last; a folder that is not there, or holds nothing old, is no fault."""
    files.forget_unused(tmp_path / "none", days=90)
    for name, read, written in (("old", 91, 95), ("read", 1, 95), ("written", 200, 1)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - read * DAY, time.time() - written * DAY))
    files.forget_unused(tmp_path, days=90)
    assert {path.name for path in tmp_path.iterdir()} == {"read", "written", ".looked-through"}
    (tmp_path / "older").touch()
    os.utime(tmp_path / "older", (0, 0))
    files.forget_unused(tmp_path, days=90)
    assert (tmp_path / "older").exists()
    os.utime(tmp_path / ".looked-through", (time.time() - 1.1 * DAY,) * 2)
    files.forget_unused(tmp_path, days=90)
    assert not (tmp_path / "older").exists()
