"""Learning-rate schedules and optimizers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from transformer_lm.errors import UserError
from transformer_lm.fields import Count, NotNegative, Positive, Rate, Share, check
from transformer_lm.training.muon import scale_by_muon

ADAM_EPSILON = 1e-9  # the original's
OPTIMIZERS = ("adamw", "muon")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates, and how large these are in each of the run's steps."""

    learning_rate: Positive  # the peak; with Muon, of the blocks' matrices
    warmup_steps: Count  # after which the peak is reached
    weight_decay: NotNegative  # decoupled (Loshchilov and Hutter 2019): of all parameters, with Muon of its own alone
    num_train_steps: Count = 500_000
    optimizer: str = "adamw"  # one of OPTIMIZERS
    embedding_learning_rate: Positive = 0.2  # with Muon, of the embedding
    head_learning_rate: Positive = 0.004  # with Muon, of all else: logits, scales, biases
    adam_b1: Rate = 0.9
    adam_b2: Rate = 0.98
    schedule: str = "rsqrt"  # one of SCHEDULES
    decay_share: Share = 0.5  # of the run's steps, over which "wsd" goes down

    def __post_init__(self):
        check(self)
        for name, choices in (("optimizer", OPTIMIZERS), ("schedule", tuple(SCHEDULES))):
            if getattr(self, name) not in choices:
                raise UserError(f"{name}={getattr(self, name)!r} must be one of {', '.join(choices)}.")


def _rsqrt(config: OptimizerConfig, step):
    """Linear from 0 to 1 over w = warmup_steps, then sqrt(w / step) (Vaswani et al. 2017, section 5.3)."""
    warmup = config.warmup_steps
    return jnp.minimum(step / warmup, jnp.sqrt(warmup / jnp.maximum(step, 1.0)))


def _wsd(config: OptimizerConfig, step):
    """Warm-up, stable, decay (Hu et al. 2024): linear to 1, constant, linear to 0 over the last steps."""
    left = (config.num_train_steps - step) / (config.decay_share * config.num_train_steps)
    return jnp.clip(jnp.minimum((step + 1) / config.warmup_steps, left), 0.0, 1.0)


def _cosine(config: OptimizerConfig, step):
    """Linear to 1, then half a cosine down to 0 (Loshchilov and Hutter 2017)."""
    warmup = config.warmup_steps
    done = (step - warmup) / max(config.num_train_steps - warmup, 1)
    return jnp.minimum((step + 1) / warmup, 0.5 + 0.5 * jnp.cos(np.pi * jnp.clip(done, 0.0, 1.0)))


SCHEDULES = {"rsqrt": _rsqrt, "wsd": _wsd, "cosine": _cosine}


def learning_rate_schedule(config: OptimizerConfig, peak: float | None = None) -> optax.Schedule:
    """step, from 0 -> learning rate, whose peak is `peak`, or the configuration's learning_rate."""
    peak = config.learning_rate if peak is None else peak
    return lambda step: peak * SCHEDULES[config.schedule](config, jnp.asarray(step, jnp.float32))


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW with the original's constants, or Muon for the blocks' matrices beside Adam for all else."""
    if config.optimizer == "adamw":
        return optax.adamw(
            learning_rate_schedule(config), config.adam_b1, config.adam_b2, ADAM_EPSILON,
            weight_decay=config.weight_decay,
        )  # fmt: skip

    def adam(peak):
        return optax.adam(learning_rate_schedule(config, peak), config.adam_b1, config.adam_b2, ADAM_EPSILON)

    muon = optax.chain(
        scale_by_muon(),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(learning_rate_schedule(config)),
    )
    groups = {
        "matrices": muon,
        "embedding": adam(config.embedding_learning_rate),
        "others": adam(config.head_learning_rate),
    }
    return optax.partition(groups, lambda params: jax.tree_util.tree_map_with_path(group_of, params))


def group_of(path: tuple, leaf: jax.Array) -> str:
    """Which of Muon's groups a parameter belongs to, by its path in the tree."""
    names = [entry.key for entry in path]
    if names[0] == "blocks" and names[-1] == "kernel":
        return "matrices"
    return "embedding" if names[0] == "embed" else "others"
