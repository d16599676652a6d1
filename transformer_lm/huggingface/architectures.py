"""Which architecture of other people's tools computes a network."""

from transformer_lm.errors import UserError
from transformer_lm.huggingface import gpt2, qwen3
from transformer_lm.huggingface.tensor_tables import Table
from transformer_lm.transformer_config import TransformerConfig

MODULES = (gpt2, qwen3)
NAMES = tuple(module.ARCHITECTURE for module in MODULES)


def table_of(network: TransformerConfig) -> Table:
    """The table of a network; raises UserError if no architecture computes it."""
    for module in MODULES:
        if all(getattr(network, name) in values for name, values in module.FIELDS.items()):
            return module.table(network)
    fields = {name: getattr(network, name) for module in MODULES for name in module.FIELDS}
    given = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    raise UserError(
        f"No architecture of transformers computes a network with {given}; those of the original's recipes and of the "
        "v2 recipes can be exported."
    )
