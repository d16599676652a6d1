"""Learning-rate schedule and optimizer."""

import dataclasses

import jax.numpy as jnp
import optax

from transformer_lm.fields import Count, NotNegative, Positive, check


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and inverse square root decay."""

    learning_rate: Positive  # the peak, reached after warmup_steps
    warmup_steps: Count
    weight_decay: NotNegative  # decoupled (Loshchilov and Hutter 2019), on all parameters as in the original

    def __post_init__(self):
        check(self)


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Linear from 0 to the peak over w = warmup_steps, then peak * sqrt(w / step) (Vaswani et al. 2017, sect. 5.3)."""
    warmup = config.warmup_steps

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        return config.learning_rate * jnp.minimum(step / warmup, jnp.sqrt(warmup / jnp.maximum(step, 1.0)))

    return schedule


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW with the original's constants."""
    return optax.adamw(learning_rate_schedule(config), b1=0.9, b2=0.98, eps=1e-9, weight_decay=config.weight_decay)
