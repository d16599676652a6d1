"""Evaluation on prepared rows."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable

import jax

from transformer_lm import models
from transformer_lm.data import input_pipeline
from transformer_lm.data.rows import PreparedRows
from transformer_lm.training import batching
from transformer_lm.training.loss import perplexity
from transformer_lm.training.sharding import Layout
from transformer_lm.training.step import make_eval_step

LN2 = math.log(2)


def evaluate_rows(
    eval_step: Callable,
    params: models.Params,
    rows: PreparedRows,
    layout: Layout,
    *,
    batch_size: int,
    max_rows: int,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """`mean_metrics` of at most `max_rows` (-1: all) prepared rows; of no use when `stopped` has ended it early."""
    only = batching.rows_here(layout, batch_size)
    batches = input_pipeline.eval_batches(rows, batch_size=batch_size, max_rows=max_rows, only=only)
    batches = itertools.takewhile(lambda _: not stopped(), batches)
    return mean_metrics(eval_step(params, batching.place(layout, batch_size, batch)) for batch in batches)


def evaluate_network(
    network: models.TransformerConfig, params: models.Params, rows: PreparedRows, layout: Layout, **options
) -> dict[str, float]:
    """`evaluate_rows`, with its options, of parameters that lie anywhere."""
    layout.check(network)
    params = jax.device_put(params, layout.of_state(params))
    return evaluate_rows(jax.jit(make_eval_step(network, layout)), params, rows, layout, **options)


def mean_metrics(sums: Iterable[dict[str, jax.Array]]) -> dict[str, float]:
    """Evaluation metrics from what `make_eval_step` gives for each batch: nats a token, bits a character and byte.

    A batch's sums are read when the next batch is on its way, so that the device does not wait for Python.
    """
    totals: Counter[str] = Counter()  # of Python's floats: many batches would outgrow float32
    for of_batch, _ in itertools.pairwise(itertools.chain(sums, [None])):
        totals.update({name: float(value) for name, value in of_batch.items()})
    loss = totals["loss"] / max(totals["tokens"], 1.0)
    bits = totals["loss"] / LN2
    return {
        "eval_loss": loss,
        "eval_perplexity": perplexity(loss),
        "eval_accuracy": totals["correct"] / max(totals["tokens"], 1.0),
        "eval_bits_per_char": bits / max(totals["characters"], 1.0),
        "eval_bits_per_byte": bits / max(totals["bytes"], 1.0),
    }
