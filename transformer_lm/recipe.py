"""From a recipe's ConfigDict to the small frozen dataclasses that the rooms take. Below here, no ConfigDict.

What computes is imported where it is read: preparing data, and each of its worker processes, does without JAX.
"""

import dataclasses
import difflib
import os
import re
import runpy
import traceback
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from etils import epath
from ml_collections import ConfigDict

from transformer_lm import fields
from transformer_lm.configs import base
from transformer_lm.data.preparation import DataConfig
from transformer_lm.errors import UserError
from transformer_lm.files import read_json

if TYPE_CHECKING:
    from transformer_lm.training.config import Recipe

NAMES = tuple(base.get_config())
# The sampler's fields, which Python's generate() calls so, in a recipe.
SAMPLING_NAMES = {
    "temperature": "sampling_temperature",
    "top_k": "sampling_top_k",
    "top_p": "sampling_top_p",
    "max_length": "max_predict_length",
}


def load(path: str) -> ConfigDict:
    """Runs the file of a recipe; a field that it lacks, as files of the original do, has the base recipe's value.

    Args:
      path: the file; what follows a colon is the argument of its get_config().

    Raises:
      UserError: there is no such file, it fails, or has a field that the base recipe does not have.
    """
    if is_missing(path):
        raise UserError(f"--config={path}: no such file; recipes lie in {os.path.dirname(base.__file__)}.")
    file, *argument = [path] if os.path.isfile(path) else path.split(":", 1)
    try:
        get_config = runpy.run_path(file, run_name="recipe").get("get_config")
        if get_config is None:
            raise UserError("it has no function get_config().")
        config = get_config(*argument)
        if not isinstance(config, ConfigDict):
            raise UserError(f"its get_config() returns {type(config).__name__}, not the ConfigDict of the base recipe.")
        for name in config:
            check_name(name)
        whole = base.get_config()
        update(whole, config, "the recipe")
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        if isinstance(error, SyntaxError) and error.filename == file:
            lines = [error.lineno]
        place = f"{file}, line {lines[-1]}" if lines else file
        raise UserError(f"{place}: {_reason(error)}") from error
    return whole


def is_missing(path: str) -> bool:
    """Whether there is no file for --config=PATH or --config=PATH:ARGUMENT."""
    return all(not os.path.exists(file) or os.path.isdir(file) for file in (path, path.split(":", 1)[0]))


def _reason(error: BaseException) -> str:
    """What is wrong with a recipe, shorter than ml_collections says it."""
    if unknown := re.match(r'.{0,3}Key "(\w+)" does not exist and cannot be added', str(error)):
        return _unknown(unknown[1])
    return f"{'' if isinstance(error, UserError) else f'{type(error).__name__}: '}{' '.join(str(error).split())}"


def check_name(name: str, shown: str = ""):
    """Raises UserError for a name that is no field of a recipe."""
    if name not in NAMES:
        raise UserError(f"{shown}: {_unknown(name)}" if shown else _unknown(name))


def check_names(config: ConfigDict):
    """Raises UserError where a recipe has a field that the base recipe does not have, or lacks one."""
    for name in config:
        check_name(name)
    if missing := [name for name in NAMES if name not in config]:
        raise UserError(f"the recipe has no field {', '.join(missing)}; begin with base.get_config().")


def _unknown(name: str) -> str:
    nearest = difflib.get_close_matches(name, NAMES, 1)
    return f"no recipe has the field {name!r}" + (f"; did you mean {nearest[0]!r}?" if nearest else ".")


def update(config: ConfigDict, values: Mapping[str, Any], source: str):
    """Gives a recipe the values of another; fields that this version does not have are passed over.

    Raises:
      UserError: a value is of another type; `source` is named.
    """
    for name in config:
        if name in values:
            try:
                config[name] = values[name]
            except (TypeError, ValueError) as error:
                kind = config.get_type(name).__name__
                raise UserError(f"{source}: {name}={str(values[name])[:80]!r} must be of the type {kind}.") from error


def read(config: ConfigDict) -> "Recipe":
    """Checks every value; raises UserError on an impossible one."""
    from transformer_lm.generation.sampler import SamplingConfig
    from transformer_lm.training.config import Recipe, TrainConfig
    from transformer_lm.training.optimizers import OptimizerConfig
    from transformer_lm.transformer_config import TransformerConfig

    check_names(config)
    config = _with_none(config)
    for name, kind in (("prompts", str), ("use_bfloat16", bool)):
        fields.check_value(name, config[name], kind)
    data, sampling = _pick(DataConfig, config), _pick(SamplingConfig, config, SAMPLING_NAMES)
    max_len = max(config.max_target_length, config.max_eval_target_length, config.max_predict_length)
    dtype = "bfloat16" if config.use_bfloat16 else "float32"
    return Recipe(
        data=data,
        network=_pick(TransformerConfig, config, max_len=max_len, dtype=dtype),
        optimizer=_pick(OptimizerConfig, config),
        train=_pick(TrainConfig, config),
        sampling=sampling,
        prompts=tuple(config.prompts.split("\n")),
        init_from=config.init_from,
        seed=config.seed,
        fields=config.to_dict(),
    )


def read_data(config: ConfigDict) -> DataConfig:
    """The part of a recipe that says which data are prepared, and how."""
    return _pick(DataConfig, _with_none(config))


def _with_none(config: ConfigDict) -> ConfigDict:
    """The recipe with None for the text "None", as a command line gives it, in fields that are None at first."""
    nones = [name for name, value in base.get_config().items() if value is None and config.get(name) == "None"]
    return ConfigDict(config.to_dict() | dict.fromkeys(nones)) if nones else config


def read_saved(path: epath.Path) -> dict:
    """The fields of the recipe in a workdir's config.json; none where it is another one, like an exported model's."""
    saved = read_json(path).get("recipe", {})
    if not isinstance(saved, dict):
        raise UserError(f"{path} is not the config.json of a workdir: its recipe is no object.")
    return saved


def _pick(dataclass, config: ConfigDict, names: dict[str, str] | None = None, **given):
    """A dataclass with the fields that the recipe has under the same names, or those in `names`."""
    names = names or {}
    picked = [field.name for field in dataclasses.fields(dataclass) if field.name not in given]
    values = {name: config[names.get(name, name)] for name in picked}
    fields.check_values(dataclass, values, names)
    return dataclass(**values, **given)
