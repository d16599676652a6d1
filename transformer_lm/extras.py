"""Libraries that only some users need, the extras of pyproject.toml: imported where they are used."""

import importlib
from types import ModuleType

from transformer_lm.errors import UserError


def optional_import(module: str, extra: str, what: str) -> ModuleType:
    """Imports a library that only some users need, or says how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{what} needs the package {error.name}: in the checkout, pip install -c constraints.txt -e '.[{extra}]'"
        ) from error
