"""What a run is: its settings, and the whole recipe."""

import dataclasses
import math

from transformer_lm.data.preparation import DataConfig
from transformer_lm.errors import UserError
from transformer_lm.generation.sampler import SamplingConfig
from transformer_lm.models import TransformerConfig
from transformer_lm.training.optimizers import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run.

    Attributes:
      per_device_batch_size: training rows a device and step.
      eval_per_device_batch_size: evaluation rows a device and step; 0 for the same.
      num_train_steps: steps altogether.
      num_eval_steps: batches an evaluation reads at most; -1 for all.
      label_smoothing: probability mass spread evenly over the other tokens (Szegedy et al. 2016, section 7).
      log_every_steps: steps between two lines of training metrics.
      eval_every_steps: steps between two evaluations.
      checkpoint_every_steps: steps between two checkpoints.
      checkpoint_every_minutes: minutes after which there is another one at the latest; 0 for no such limit.
      keep_checkpoints: how many of the latest are kept.
      save_checkpoints: whether to save at all.
      restore_checkpoints: whether to go on from the workdir's newest checkpoint.
    """

    per_device_batch_size: int
    eval_per_device_batch_size: int
    num_train_steps: int
    num_eval_steps: int
    label_smoothing: float
    log_every_steps: int
    eval_every_steps: int
    checkpoint_every_steps: int
    checkpoint_every_minutes: float
    keep_checkpoints: int
    save_checkpoints: bool
    restore_checkpoints: bool

    def __post_init__(self):
        positive = ("per_device_batch_size", "num_train_steps", "log_every_steps", "eval_every_steps",
                    "checkpoint_every_steps", "keep_checkpoints")  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.eval_per_device_batch_size < 0:
            raise UserError(f"eval_per_device_batch_size={self.eval_per_device_batch_size} must not be negative.")
        if self.num_eval_steps < 1 and self.num_eval_steps != -1:
            raise UserError(f"num_eval_steps={self.num_eval_steps} must be at least 1, or -1 for all.")
        if not 0 <= self.checkpoint_every_minutes < math.inf:
            raise UserError(f"checkpoint_every_minutes={self.checkpoint_every_minutes} must be 0 (never) or more.")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing={self.label_smoothing} must lie in [0, 1).")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A checked recipe: all that a run is told. `transformer_lm.recipe` reads it from a ConfigDict.

    Attributes:
      data: which corpus, tokenizer and rows.
      network: its vocab_size is what is wished for until a tokenizer is there.
      optimizer: schedule and optimizer.
      train: the run.
      sampling: how text is generated.
      prompts: texts to continue.
      init_from: address of the model whose parameters the run begins with; None for random ones.
      seed: of parameters, dropout, order of data and sampling.
      fields: the recipe as it was given, for the record.
    """

    data: DataConfig
    network: TransformerConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    sampling: SamplingConfig
    prompts: tuple[str, ...]
    init_from: str | None
    seed: int
    fields: dict
