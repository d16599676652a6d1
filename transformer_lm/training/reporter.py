"""What is said of the steps that are done."""

import math
import time

import jax
import optax

from transformer_lm.errors import UserError
from transformer_lm.training import metrics
from transformer_lm.training.flops import peak_flops
from transformer_lm.training.loss import perplexity


class Reporter:
    """Reads the metrics of finished steps, stops on a loss that is not finite, and hands lines to the writer."""

    def __init__(self, writer: metrics.MetricWriter, schedule: optax.Schedule, flops: float, devices: int):
        self._writer = writer
        self._schedule = schedule
        self._flops = flops
        peak = peak_flops(jax.devices()[0])
        self._peak = peak and peak * devices
        self.pending: tuple | None = None
        self._clock: float | None = None  # when the steps now counted began; None before the first is done
        self._timed_steps = 0
        self._tokens_per_second = 0.0

    def flush(self):
        """Reports the pending step, if there is one; waits for the device to finish it."""
        if self.pending is None:
            return
        (step, step_metrics, totals, steps_in_totals), self.pending = self.pending, None
        step_metrics = {name: float(value) for name, value in step_metrics.items()}
        if not all(map(math.isfinite, step_metrics.values())):
            raise UserError(
                f"Training diverged at step {step}: loss {step_metrics['loss']}, gradient norm "
                f"{step_metrics['grad_norm']}. The last good checkpoint is kept; start again with a lower "
                "learning_rate or more warmup_steps."
            )
        if self._clock is None:
            self._clock = time.perf_counter()
        else:
            self._timed_steps += 1
        if totals is not None:
            self._write(step, totals, steps_in_totals)
        self._writer.show(step, f"loss {step_metrics['loss']:.3f}  {self._tokens_per_second:,.0f} tokens/s")

    def restart_clock(self):
        """Leaves out of the speed whatever has happened since the last step (an evaluation, a checkpoint)."""
        self._clock, self._timed_steps = None, 0

    def _write(self, step: int, totals: dict, steps: int):
        totals = {name: float(total) for name, total in totals.items()}
        loss = totals["loss"] / totals["tokens"]
        values = {
            "train_loss": loss,
            "train_accuracy": totals["correct"] / totals["tokens"],
            "train_perplexity": perplexity(loss),
            "learning_rate": float(self._schedule(step - 1)),
        }
        if self._timed_steps:
            seconds = time.perf_counter() - self._clock
            self._tokens_per_second = totals["tokens"] / steps * self._timed_steps / seconds
            values["tokens_per_second"] = self._tokens_per_second
            if self._peak:
                values["mfu"] = self._tokens_per_second * self._flops / self._peak
            self._clock, self._timed_steps = time.perf_counter(), 0
        self._writer.write(step, values)
