"""What is said of the steps that are done."""

import contextlib
import math
import time
from collections.abc import Iterator

import jax
import optax

from transformer_lm.errors import UserError
from transformer_lm.training import metrics
from transformer_lm.training.loss import perplexity

SPEEDS = ("tokens_per_second", "step_seconds", "data_wait", "mfu", "first_step_seconds", "peak_memory")  # of a machine


class Reporter:
    """Reads the metrics of finished steps, stops on a loss that is not finite, and hands lines to the writer.

    Attributes:
      peak: FLOP/s that the devices could reach.
      pending: of the step that was dispatched last its number, its metrics, and the totals to log or None; None when
        it has been reported.
    """

    def __init__(
        self, writer: metrics.MetricWriter, schedule: optax.Schedule, flops: float, tokens: int, *, seconds: float
    ):
        """`flops`: of a token; `tokens`: of a step, scored or not; `seconds`: of the run so far."""
        self._writer = writer
        self._tokens = tokens
        self._learning_rate = jax.jit(schedule)  # one program, not one for each operation
        self._flops, self.peak = flops, math.inf
        self.pending: tuple | None = None
        self._began: float | None = time.perf_counter() - seconds  # None when the first step is done
        self._untold: dict[str, float] = {}  # how long that took, until it has been told
        self._waited = 0.0  # seconds that the devices waited for data, in the steps now counted
        self._clock: float | None = None  # when the steps now counted began; None before the first is done
        self._timed_steps = 0
        self._tokens_per_second = 0.0

    def flush(self):
        """Reports the pending step, if there is one; waits for the device to finish it."""
        if self.pending is None:
            return
        (step, step_metrics, totals), self.pending = self.pending, None
        step_metrics = {name: float(value) for name, value in step_metrics.items()}
        if not all(map(math.isfinite, step_metrics.values())):
            raise UserError(
                f"Training diverged at step {step}: loss {step_metrics['loss']}, gradient norm "
                f"{step_metrics['grad_norm']}. The last good checkpoint is kept; start again with a lower "
                "learning_rate or more warmup_steps."
            )
        if self._began is not None:
            self._untold, self._began = {"first_step_seconds": time.perf_counter() - self._began}, None
        if self._clock is None:
            self._clock, self._waited = time.perf_counter(), 0.0
        else:
            self._timed_steps += 1
        if totals is not None:
            self._write(step, totals)
        self._writer.show(step, f"loss {step_metrics['loss']:.3f}  {self._tokens_per_second:,.0f} tokens/s")

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the time within, unless the devices still have the pending step to do at its end.

        They may have become idle in the middle of it: what is counted is the most that they can have waited.
        """
        start = time.perf_counter()
        yield
        if self.pending is None or all(value.is_ready() for value in self.pending[1].values()):
            self._waited += time.perf_counter() - start

    def restart_clock(self):
        """Leaves out of the speed whatever has happened since the last step (an evaluation, a checkpoint)."""
        self._clock, self._timed_steps = None, 0

    def _write(self, step: int, totals: dict):
        totals = {name: float(total) for name, total in totals.items()}
        tokens = max(totals["tokens"], 1.0)  # of conversations none may be scored
        loss = totals["loss"] / tokens
        values = {
            "train_loss": loss,
            "train_accuracy": totals["correct"] / tokens,
            "train_perplexity": perplexity(loss),
            "learning_rate": float(self._learning_rate(step - 1)),
        }
        self._writer.write(step, values | self._speeds())

    def _speeds(self) -> dict[str, float]:
        """How fast the steps since the last report were."""
        values, self._untold = self._untold, {}
        now = time.perf_counter()
        if self._timed_steps:
            seconds = now - self._clock
            self._tokens_per_second = self._tokens * self._timed_steps / seconds
            values |= {
                "tokens_per_second": self._tokens_per_second,
                "step_seconds": seconds / self._timed_steps,
                "data_wait": self._waited / seconds,
                "mfu": self._tokens_per_second * self._flops / self.peak,
            }
            self._clock, self._timed_steps, self._waited = now, 0, 0.0
        if memory := jax.local_devices()[0].memory_stats():  # a CPU has none
            values["peak_memory"] = memory["peak_bytes_in_use"] / 2**30
        return values
