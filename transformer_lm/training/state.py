"""All that a run is made of at one moment."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from transformer_lm import models
from transformer_lm.training.sharding import Layout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run is made of at one moment.

    Attributes:
      step: int32 scalar, steps done.
      params: the parameters.
      opt_state: the optimizer's state.
      totals: sums over the steps since training metrics were last logged: loss (nats), correct, tokens. They lie in
        the state so that a resumed run logs what an unbroken one would have.
    """

    step: jax.Array
    params: models.Params
    opt_state: Any
    totals: dict[str, jax.Array]


def zero_totals() -> dict[str, np.ndarray]:
    """Nothing counted yet; in NumPy, since JAX (0.10) spoils arrays of its own that it spreads over processes."""
    return {name: np.zeros((), np.float32) for name in ("loss", "correct", "tokens")}


def state_of(params: models.Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state that begins with these parameters; pure."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), zero_totals())


def init_state(
    network: models.TransformerConfig, optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """A fresh state; pure, so that it may be jitted straight into its shardings, or only looked at abstractly."""
    return state_of(models.init(network, key), optimizer)


def abstract_state(
    network: models.TransformerConfig, optimizer: optax.GradientTransformation, layout: Layout
) -> TrainState:
    """Shapes, dtypes and shardings of a state, which is not made: what to restore, or to compile for."""
    state = jax.eval_shape(lambda params: state_of(params, optimizer), models.abstract_params(network))
    return jax.tree.map(lambda x, place: x.update(sharding=place), state, layout.of_state(state))
