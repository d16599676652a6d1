"""Where a run begins: at the workdir's newest checkpoint, at another model's parameters, or at random ones."""

import dataclasses
from collections.abc import Callable

import jax

from transformer_lm import models
from transformer_lm.checkpoints import loading, store
from transformer_lm.errors import UserError
from transformer_lm.tokenizer import Tokenizer
from transformer_lm.training.config import TrainConfig
from transformer_lm.training.state import TrainState


def restore_or_init(
    saved: store.Checkpoints,
    config: TrainConfig,
    make_state: Callable[[jax.Array], TrainState],
    key,
    placement,
    params: models.Params | None = None,
) -> TrainState:
    """The newest checkpoint of the workdir; where there is none or it is not wanted a fresh state, of `params` if any.

    The optimizer's state does not depend on the parameters' values, so that those of a fresh state may be replaced.
    """
    if config.restore_checkpoints:
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement), jax.eval_shape(make_state, key)
        )
        restored = saved.restore(target.params, target.opt_state, {"step": target.step, "totals": target.totals})
        if restored is not None:
            params, opt_state, progress = restored
            return TrainState(progress["step"], params, opt_state, progress["totals"])
    elif config.save_checkpoints and saved.steps:
        raise UserError(
            f"The workdir holds checkpoints {saved.steps}, and restore_checkpoints=False would begin again beside "
            "them; use another --workdir."
        )
    state = jax.jit(make_state, out_shardings=placement)(key)
    return state if params is None else dataclasses.replace(state, params=jax.device_put(params, placement))


def initial_params(
    address: str | None, network: models.TransformerConfig, tokenizer: Tokenizer, workdir: str
) -> models.Params | None:
    """The parameters that a run begins with, if not with random ones; raises UserError if they do not fit."""
    initial = loading.load_initial(address, network, workdir)
    if initial is None:
        return None
    if Tokenizer.load(initial.tokenizer_path).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"The tokenizer at {tokenizer.source} is not that of init_from={address}; use another --workdir and leave "
            "vocab_path alone."
        )
    return initial.params
