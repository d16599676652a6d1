"""Evaluation on prepared rows."""

import math
from collections.abc import Callable, Iterable

import jax

from transformer_lm import models
from transformer_lm.data import input_pipeline
from transformer_lm.training import sharding
from transformer_lm.training.config import TrainConfig
from transformer_lm.training.loss import perplexity
from transformer_lm.training.state import zero_totals

LN2 = math.log(2)


def evaluate(eval_step: Callable, params: models.Params, batches: Iterable, manifest: dict) -> dict[str, float]:
    """Evaluation metrics over batches: nats a token, and bits a character and byte by the corpus's own counts."""
    totals = dict.fromkeys(zero_totals(), 0.0)  # of Python's floats: many batches would outgrow float32
    for batch in batches:
        for name, value in eval_step(params, batch).items():
            totals[name] += float(value)
    loss = totals["loss"] / totals["tokens"]
    bits = loss / LN2 * manifest["tokens"]
    return {
        "eval_loss": loss,
        "eval_perplexity": perplexity(loss),
        "eval_accuracy": totals["correct"] / totals["tokens"],
        "eval_bits_per_char": bits / manifest["characters"],
        "eval_bits_per_byte": bits / manifest["bytes"],
    }


def evaluate_rows(eval_step: Callable, params: models.Params, rows, config: TrainConfig, mesh) -> dict[str, float]:
    """`evaluate` on prepared rows (a `PreparedCorpus` or `PreparedMixture`), spread over the mesh."""
    batch_size = (config.eval_per_device_batch_size or config.per_device_batch_size) * mesh.size
    batches = input_pipeline.eval_batches(rows, batch_size=batch_size, max_batches=config.num_eval_steps)
    placed = (jax.device_put(batch, sharding.batch_sharding(mesh)) for batch in batches)
    return evaluate(eval_step, params, placed, rows.manifest)
