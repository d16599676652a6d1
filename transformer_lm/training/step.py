"""One step of training, and one of evaluation: pure functions of state and batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from transformer_lm import axes, dropout, models
from transformer_lm.logits import chunks_of
from transformer_lm.training.loss import chunked_loss_and_totals
from transformer_lm.training.sharding import Layout
from transformer_lm.training.state import TrainState, zero_totals

# What a training step takes of a batch: arrays [B, T].
ROWS = {
    "inputs": np.int32,
    "targets": np.int32,
    "positions": np.int32,
    "segments": np.int32,
    "scored": np.bool_,
}


def summed_loss(
    network: models.TransformerConfig, params: models.Params, batch, *, ways=1, smoothing=0.0, keys=None,
    for_gradient=False,
):  # fmt: skip
    """What `loss_and_totals` gives for a batch.

    Args:
      network: what computes.
      params: its parameters.
      batch: arrays [B, T].
      ways: over how many devices rows are spread.
      smoothing: of labels.
      keys: of dropout, one a row.
      for_gradient: whether one is taken.
    """
    x = models.bind(network, params).read(
        batch["inputs"], batch["positions"], batch["segments"], dropout_keys=keys, for_gradient=for_gradient
    )
    rows, length = batch["targets"].shape
    return chunked_loss_and_totals(
        lambda head, x: axes.named(models.bind(network, head).to_logits(x), "batch", None, "vocab_size"),
        models.head(network, params), x, batch["targets"], batch["scored"].astype(jnp.float32),
        label_smoothing=smoothing, chunks=chunks_of(-(-rows // ways), length, network.vocab_size),
    )  # fmt: skip


def make_train_step(
    network: models.TransformerConfig,
    optimizer: optax.GradientTransformation,
    label_smoothing: float,
    *,
    layout: Layout | None = None,
    accumulation: int = 1,
) -> Callable[[TrainState, Any, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """The step: (state, batch, key) -> the next state, and {"loss": mean nats a token, "grad_norm"}.

    `key` stays the same for a whole run; each step folds its number into it. The gradient is that of the mean over all
    tokens of the global batch, however they are spread over devices, and over `accumulation` parts of the batch, which
    are computed one after the other.
    """
    ways = layout.ways("batch") if layout else 1

    def gradient(params, batch, key):
        """Sums of gradients and totals of a batch, whose array "rows" [B] numbers its rows."""

        def loss(params):
            keys = dropout.row_keys(key, batch["rows"])
            return summed_loss(
                network, params, batch, ways=ways, smoothing=label_smoothing, keys=keys, for_gradient=True
            )

        (_, totals), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return _laid_out(grads, layout), totals

    def accumulated_gradient(params, batch, key):
        # Rows that lie together in the batch lie on one device: each part takes some of every device's.
        parts = jax.tree.map(lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch)
        parts = jax.tree.map(lambda x: axes.named(x, None, "batch", *[None] * (x.ndim - 2)), parts)

        def add(sums, part):
            return jax.tree.map(jnp.add, sums, gradient(params, part, key)), None

        start = _laid_out(jax.tree.map(jnp.zeros_like, params), layout), zero_totals()
        return jax.lax.scan(add, start, parts)[0]

    def train_step(state, batch, key):
        with axes.laid_out(layout):
            batch = batch | {"rows": jnp.arange(batch["targets"].shape[0])}
            key = jax.random.fold_in(key, state.step)
            grads, totals = (accumulated_gradient if accumulation > 1 else gradient)(state.params, batch, key)
            tokens = jnp.maximum(totals["tokens"], 1.0)
            grad_norm = optax.tree.norm(grads) / tokens  # of sums: of what is divided XLA would keep the squares
            grads = jax.tree.map(lambda grad: grad / tokens, grads)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            new_state = TrainState(
                step=state.step + 1,
                params=optax.apply_updates(state.params, updates),
                opt_state=opt_state,
                totals=jax.tree.map(jnp.add, state.totals, totals),
            )
            return new_state, {"loss": totals["loss"] / tokens, "grad_norm": grad_norm}

    return train_step


def _laid_out(params: models.Params, layout: Layout | None) -> models.Params:
    """Gradients where their parameters lie: each device sums up its part alone."""
    return params if layout is None else jax.lax.with_sharding_constraint(params, layout.of_state(params))


def jit_train_step(
    network: models.TransformerConfig,
    optimizer: optax.GradientTransformation,
    label_smoothing: float,
    state: TrainState,
    *,
    layout: Layout,
    accumulation: int,
):
    """As `make_train_step`, to be compiled for the layout: takes a state over, and leaves the next where that lay.

    `state` is one like those that it will be given; an abstract one will do.
    """
    step = make_train_step(network, optimizer, label_smoothing, layout=layout, accumulation=accumulation)
    return jax.jit(step, donate_argnums=0, out_shardings=(layout.of_state(state), layout.sharding()))


def abstract_arguments(state: TrainState, layout: Layout, rows: int, length: int) -> tuple:
    """What a step is lowered with: an abstract state, so many rows of `length` tokens, the key of dropout."""
    place = layout.sharding("batch")
    batch = {name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=place) for name, dtype in ROWS.items()}
    key = jax.eval_shape(lambda: jax.random.key(0, impl=dropout.KEYS))
    return state, batch, jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=layout.sharding())


def make_eval_step(network: models.TransformerConfig, layout: Layout | None = None) -> Callable:
    """(params, batch) -> the sums of `loss_and_totals`, and of the characters and bytes of the batch's rows."""

    def eval_step(params, batch):
        with axes.laid_out(layout):
            counts = {name: jnp.sum(batch[name]) for name in ("characters", "bytes")}
            return summed_loss(network, params, batch, ways=layout.ways("batch") if layout else 1)[1] | counts

    return eval_step
