"""What a run is: its settings, and the whole recipe."""

import dataclasses
from typing import Annotated

from transformer_lm.data.preparation import DataConfig
from transformer_lm.errors import UserError
from transformer_lm.fields import (
    BatchSize,
    Count,
    CountOrAll,
    CountOrZero,
    NotNegative,
    Range,
    Rate,
    Seed,
    check,
    check_value,
)
from transformer_lm.generation.sampler import SamplingConfig
from transformer_lm.training.optimizers import OptimizerConfig
from transformer_lm.transformer_config import TransformerConfig

# What makes a step take less memory: what may be lower, and what else helps.
LESS_MEMORY = "per_device_batch_size, max_target_length or the network's size, or set remat=block or a larger mesh_fsdp"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run: batches, and what happens after how many steps."""

    per_device_batch_size: BatchSize
    eval_per_device_batch_size: Annotated[int, Range(least=0, most=2**16)]  # 0 for the same as in training
    global_batch_size: CountOrZero  # rows a step; 0 for what the run had before, or per_device_batch_size x devices
    gradient_accumulation_steps: CountOrZero  # 0 for so many that a device has per_device_batch_size rows at a time
    mesh_fsdp: Count
    mesh_tensor: Count
    num_train_steps: Count
    num_eval_steps: CountOrAll
    label_smoothing: Rate  # probability mass spread over the other tokens (Szegedy et al. 2016, section 7)
    log_every_steps: Count
    eval_every_steps: Count
    checkpoint_every_steps: Count
    checkpoint_every_minutes: NotNegative  # 0 for by steps alone
    keep_checkpoints: Count
    save_checkpoints: bool
    restore_checkpoints: bool  # go on from the workdir's newest checkpoint

    def __post_init__(self):
        check(self)
        if self.num_eval_steps == 0:
            raise UserError("num_eval_steps=0 must be at least 1, or -1 for all.")


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
    seed: Seed
    fields: dict

    def __post_init__(self):
        check_value("seed", self.seed, Seed)
