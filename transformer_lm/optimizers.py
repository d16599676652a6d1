"""Learning-rate schedule and optimizer."""

import dataclasses

import jax.numpy as jnp
import optax

from transformer_lm.errors import UserError


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and inverse square root decay.

    Attributes:
      learning_rate: the peak, reached after `warmup_steps`.
      warmup_steps: steps of the linear rise from 0.
      weight_decay: decoupled decay (Loshchilov and Hutter 2019), on all parameters as in the original.
    """

    learning_rate: float
    warmup_steps: int
    weight_decay: float

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise UserError(f"learning_rate={self.learning_rate} must be above 0.")
        if self.warmup_steps < 1:
            raise UserError(f"warmup_steps={self.warmup_steps} must be at least 1.")
        if self.weight_decay < 0:
            raise UserError(f"weight_decay={self.weight_decay} must not be negative.")


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Linear from 0 to the peak over w = warmup_steps, then peak * sqrt(w / step) (Vaswani et al. 2017, section 5.3)."""
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)

    def decay(steps_after_warmup):
        return config.learning_rate * jnp.sqrt(config.warmup_steps / (steps_after_warmup + config.warmup_steps))

    return optax.join_schedules([warmup, decay], boundaries=[config.warmup_steps])


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW with the original's constants."""
    return optax.adamw(learning_rate_schedule(config), b1=0.9, b2=0.98, eps=1e-9, weight_decay=config.weight_decay)
