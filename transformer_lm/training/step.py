"""One step of training, and one of evaluation: pure functions of state and batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from transformer_lm import models
from transformer_lm.training.loss import loss_and_totals
from transformer_lm.training.state import TrainState


def apply_network(network: models.TransformerConfig, params: models.Params, batch, dropout_key=None):
    """Logits [B, T, V] and weights [B, T] of a batch."""
    logits = models.bind(network, params)(
        batch["inputs"], batch["positions"], batch["segments"], dropout_key=dropout_key
    )
    return logits, (batch["segments"] > 0).astype(jnp.float32)


def make_train_step(
    network: models.TransformerConfig, optimizer: optax.GradientTransformation, label_smoothing: float
) -> Callable[[TrainState, Any, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """The step: (state, batch, key) -> the next state, and {"loss": mean nats a token, "grad_norm"}.

    `key` stays the same for a whole run; each step folds its number into it. The gradient is that of the mean over all
    tokens of the global batch, however they are spread over devices.
    """

    def train_step(state, batch, key):
        dropout_key = jax.random.fold_in(key, state.step)

        def mean_loss(params):
            logits, weights = apply_network(network, params, batch, dropout_key)
            loss, totals = loss_and_totals(logits, batch["targets"], weights, label_smoothing)
            return loss / jnp.maximum(totals["tokens"], 1.0), totals

        (_, totals), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new_state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            totals=jax.tree.map(jnp.add, state.totals, totals),
        )
        return new_state, {"loss": totals["loss"] / totals["tokens"], "grad_norm": optax.global_norm(grads)}

    return train_step


def make_eval_step(network: models.TransformerConfig) -> Callable:
    """(params, batch) -> the sums of `loss_and_totals`, and of the characters and bytes of the batch's rows."""

    def eval_step(params, batch):
        logits, weights = apply_network(network, params, batch)
        counts = {name: jnp.sum(batch[name]) for name in ("characters", "bytes")}
        return loss_and_totals(logits, batch["targets"], weights)[1] | counts

    return eval_step
