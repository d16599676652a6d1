"""The contract of a workdir: the names in it, and what its config.json says."""

import dataclasses
import json

from etils import epath

from transformer_lm import models
from transformer_lm.errors import UserError
from transformer_lm.files import read_json, write_atomically
from transformer_lm.tokenizer import Tokenizer

CHECKPOINTS_DIR = "checkpoints"
DAMAGED_DIR = "damaged_checkpoints"
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "sentencepiece_model"
METRICS_FILE = "metrics.jsonl"
# The network's fields that may change between two starts of a run, since its parameters are the same. All others may
# not, those included that are added to the network later.
FREE_FIELDS = {"max_len", "dropout_rate", "attention_dropout_rate", "dtype"}


def claim_workdir(
    workdir: epath.Path, recipe: dict, network: models.TransformerConfig, tokenizer: Tokenizer, rows: list[str]
):
    """Writes config.json and sentencepiece_model, before a run.

    Args:
      workdir: the folder of the run.
      recipe: its fields, for the record.
      network: the network as it is.
      tokenizer: the tokenizer of its rows.
      rows: names of the folders of prepared rows that it reads.

    Raises:
      UserError: the workdir holds checkpoints of another network or tokenizer, which a run would spoil.
    """
    if (workdir / CHECKPOINTS_DIR).exists() and (workdir / CONFIG_FILE).exists():
        before, fingerprint = read_run_config(workdir)
        check_same_network(str(workdir), before, network)
        if fingerprint != tokenizer.fingerprint:
            raise UserError(f"{workdir} holds a model of another tokenizer; restore that, or use another --workdir.")
    content = {
        "recipe": recipe,
        "model": dataclasses.asdict(network),
        "tokenizer_sha256": tokenizer.fingerprint,
        "rows": rows,
    }
    write_atomically(workdir / TOKENIZER_FILE, tokenizer.model)
    write_atomically(workdir / CONFIG_FILE, json.dumps(content, ensure_ascii=False, indent=1).encode())


def check_same_network(place: str, before: models.TransformerConfig, network: models.TransformerConfig):
    """Raises UserError where the model at a place has other parameters than the run's."""
    for name in sorted(vars(network).keys() - FREE_FIELDS):
        old, new = getattr(before, name), getattr(network, name)
        if old != new:
            raise UserError(
                f"{place} holds a model with {name}={old}, but this run has {name}={new}; "
                "use its value, or name another."
            )


def read_run_config(workdir: epath.Path) -> tuple[models.TransformerConfig, str]:
    """The network and the tokenizer's hash in a workdir's config.json; raises UserError if it is not such a file."""
    path = workdir / CONFIG_FILE
    content = read_json(path)
    return models.TransformerConfig.from_json(content.get("model"), str(path)), content.get("tokenizer_sha256", "")
