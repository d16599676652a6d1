"""Where a run begins: at the workdir's newest checkpoint, at another model's parameters, or at random ones."""

import jax
import numpy as np
import optax

from transformer_lm import models
from transformer_lm.checkpoints import loading, store
from transformer_lm.errors import UserError
from transformer_lm.tokenizer import Tokenizer
from transformer_lm.training.config import Recipe, TrainConfig
from transformer_lm.training.sharding import Layout
from transformer_lm.training.state import TrainState, init_state, state_of


def restore_or_init(
    saved: store.Checkpoints,
    recipe: Recipe,
    network: models.TransformerConfig,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    target: TrainState,
    *,
    initial: loading.FoundModel | None,
    key: jax.Array,
    batch_size: int,
) -> tuple[TrainState, int]:
    """The newest checkpoint of the workdir; where there is none, or it is not wanted, a fresh state.

    Args:
      saved: the workdir's checkpoints.
      recipe: what is trained.
      network: the network as it is.
      optimizer: its optimizer.
      layout: the devices.
      target: an abstract state, which says where the state's arrays lie.
      initial: the model whose parameters a fresh state takes; None for random ones.
      key: of random parameters.
      batch_size: rows a step, to reckon with where a checkpoint does not say how many rows were read.

    Returns:
      the state, and how many training rows were read until then.
    """
    _check_wanted(saved, recipe.train)
    if recipe.train.restore_checkpoints:
        progress = {"step": target.step, "totals": target.totals, "rows": np.zeros((), np.int64)}
        restored = saved.restore(target.params, target.opt_state, progress)
        if restored is not None:
            params, opt_state, progress = restored
            rows = progress.get("rows", int(progress["step"]) * batch_size)  # which older checkpoints do not have
            return TrainState(progress["step"], params, opt_state, progress["totals"]), int(rows)
    placement = jax.tree.map(lambda x: x.sharding, target)
    if initial is None:
        return jax.jit(init_state, static_argnums=(0, 1), out_shardings=placement)(network, optimizer, key), 0
    params = layout.spread(initial.load().params)
    fresh = jax.jit(lambda params: state_of(params, optimizer), out_shardings=placement, donate_argnums=0)
    return fresh(params), 0


def _check_wanted(saved: store.Checkpoints, config: TrainConfig):
    """Raises UserError where a run would begin again beside checkpoints, and write over its metrics."""
    if not config.restore_checkpoints and (saved.steps or saved.set_aside):
        raise UserError(
            f"The workdir holds checkpoints ({', '.join([*map(str, saved.steps), *saved.set_aside])}), and "
            "restore_checkpoints=False would begin again beside them; use another --workdir."
        )


def find_initial(recipe: Recipe, network: models.TransformerConfig, tokenizer: Tokenizer, workdir: str):
    """The model that a run begins with, None for a random one; raises UserError if it does not fit."""
    initial = loading.find_initial(recipe.init_from, network, workdir)
    if initial and Tokenizer.load(initial.tokenizer_path).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"The tokenizer at {tokenizer.source} is not that of init_from={recipe.init_from}; use another --workdir "
            "and leave vocab_path alone."
        )
    return initial
