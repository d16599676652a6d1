"""The notice of preemption, from a stand-in for Google Cloud's metadata server; test_loop.py has a run to stop."""

import queue
import threading

import metadata_server
import pytest

from transformer_lm.training import preemption


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(preemption, "PAUSE_SECONDS", 0.01)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "_watch" in thread.name]


def test_told_when_it_comes(monkeypatch):
    """Not before, once, and though the server failed at first."""
    told = queue.Queue()
    with metadata_server.serving() as server:
        monkeypatch.setenv("GCE_METADATA_HOST", f"localhost:{server.server_port}")
        with preemption.preemption_watched(told.put):
            with pytest.raises(queue.Empty):
                told.get(timeout=0.3)
            assert server.statuses == [503, 200]
            server.preempted.set()
            assert told.get(timeout=10) == "Google Cloud's preemption notice"
            for watching in threads():
                watching.join(10)
    assert server.statuses == [503, 200, 200]
    assert told.empty()


def test_a_server_without_such_a_notice_is_left_alone(monkeypatch):
    monkeypatch.setattr(preemption, "NOTICE", "/other")
    with metadata_server.serving() as server:
        monkeypatch.setenv("GCE_METADATA_HOST", f"localhost:{server.server_port}")
        with preemption.preemption_watched(print):
            for watching in threads():
                watching.join(10)
    assert server.statuses == [404]


@pytest.mark.parametrize(("product", "watching"), [("Google Compute Engine\n", 1), ("HVM domU\n", 0), (None, 0)])
def test_only_on_google_cloud(monkeypatch, tmp_path, product, watching):
    """Which the machine itself says; elsewhere no thread and no network."""
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    monkeypatch.setattr(preemption, "PRODUCT_NAME", tmp_path / "product_name")
    monkeypatch.setattr(preemption, "METADATA_HOST", "localhost:9")
    if product:
        (tmp_path / "product_name").write_text(product)
    with preemption.preemption_watched(print):
        assert len(threads()) == watching
    for ending in threads():
        ending.join(10)
        assert not ending.is_alive()
