"""What is said of steps: how long they took, and how long the devices had to wait for data."""

from types import SimpleNamespace

import pytest

from transformer_lm.training import reporter


class Writer:
    """Keeps the last line."""

    def write(self, step, values):
        self.values = values

    def show(self, step, text):
        pass


class Metric(float):
    """A number that a device has computed, or is still about to."""

    done = True

    def is_ready(self) -> bool:
        return self.done


class Unfinished(Metric):
    done = False


@pytest.mark.parametrize(("kind", "share"), [(Metric, 0.75), (Unfinished, 0)])
def test_data_wait_is_what_the_devices_waited(monkeypatch, kind, share):
    """Three of a step's four seconds, or nothing when they have the step before to do all the while."""
    clock = SimpleNamespace(now=0)
    monkeypatch.setattr(reporter, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    writer = Writer()
    told = reporter.Reporter(writer, schedule=lambda step: 0.1, flops=1.0, tokens=8, seconds=0)
    told.peak = 1.0
    for step in range(1, 4):
        with told.waiting_for_data():
            clock.now += 3
        clock.now += 1
        told.flush()
        totals = {"loss": 1.0, "correct": 1.0, "tokens": 2.0}
        told.pending = step, {"loss": kind(0.5), "grad_norm": kind(1)}, totals
    assert writer.values["step_seconds"] == 4
    assert writer.values["tokens_per_second"] == 2  # whatever share of them is scored
    assert writer.values["mfu"] == 2
    assert writer.values["data_wait"] == share


def test_the_first_step_and_no_other(monkeypatch):
    """However late it is told of; a window of conversations without a scored token is no error."""
    clock = SimpleNamespace(now=0)
    monkeypatch.setattr(reporter, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    writer = Writer()
    told = reporter.Reporter(writer, schedule=lambda step: 0.1, flops=1.0, tokens=8, seconds=20)
    for step in range(1, 101):
        clock.now += 10 if step == 1 else 1
        totals = {"loss": 0.0, "correct": 0.0, "tokens": 0.0} if step == 100 else None
        told.pending = step, {"loss": Metric(0.5), "grad_norm": Metric(1)}, totals
        told.flush()
    assert writer.values["first_step_seconds"] == 30
    assert writer.values["step_seconds"] == 1
    assert writer.values["train_loss"] == 0
