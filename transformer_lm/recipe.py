"""From a recipe's ConfigDict to the small frozen dataclasses that the rooms take. Below here, no ConfigDict.

What computes is imported where it is read: preparing data, and each of its worker processes, does without JAX.
"""

import dataclasses
from typing import TYPE_CHECKING

from etils import epath
from ml_collections import ConfigDict

from transformer_lm.data.preparation import DataConfig
from transformer_lm.errors import UserError
from transformer_lm.files import read_json

if TYPE_CHECKING:
    from transformer_lm.training.config import Recipe


def read(config: ConfigDict) -> "Recipe":
    """Checks every value; raises UserError on an impossible one."""
    from transformer_lm.generation.sampler import SamplingConfig
    from transformer_lm.models import TransformerConfig
    from transformer_lm.training.config import Recipe, TrainConfig
    from transformer_lm.training.optimizers import OptimizerConfig

    if not 0 <= config.seed < 2**31:
        raise UserError(f"seed={config.seed} must lie in [0, 2**31).")
    return Recipe(
        data=read_data(config),
        network=_pick(
            TransformerConfig,
            config,
            max_len=max(config.max_target_length, config.max_eval_target_length, config.max_predict_length),
            dtype="bfloat16" if config.use_bfloat16 else "float32",
        ),
        optimizer=_pick(OptimizerConfig, config),
        train=_pick(TrainConfig, config),
        sampling=SamplingConfig(
            temperature=config.sampling_temperature,
            top_k=config.sampling_top_k,
            top_p=config.sampling_top_p,
            max_length=config.max_predict_length,
        ),
        prompts=tuple(config.prompts.split("\n")),
        init_from=config.init_from,
        seed=config.seed,
        fields=config.to_dict(),
    )


def read_data(config: ConfigDict) -> DataConfig:
    """The part of a recipe that says which data are prepared, and how."""
    return _pick(DataConfig, config)


def read_saved(path: epath.Path) -> dict:
    """The fields of the recipe in a workdir's config.json; none where it is another one, like an exported model's."""
    fields = read_json(path).get("recipe", {})
    if not isinstance(fields, dict):
        raise UserError(f"{path} is not the config.json of a workdir: its recipe is no object.")
    return fields


def _pick(dataclass, config: ConfigDict, **given):
    """A dataclass with the fields that the recipe has under the same names."""
    names = [field.name for field in dataclasses.fields(dataclass) if field.name not in given]
    return dataclass(**{name: config[name] for name in names}, **given)
