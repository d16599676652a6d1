"""The contract of a workdir: the names in it, and what its config.json says."""

import json
from typing import Any

from absl import logging
from etils import epath

from transformer_lm.errors import UserError
from transformer_lm.files import children, is_remote, json_bytes, read_json, write_atomically
from transformer_lm.tokenizer import Tokenizer
from transformer_lm.transformer_config import MANNER, TransformerConfig

CHECKPOINTS_DIR = "checkpoints"
DAMAGED_DIR = "damaged_checkpoints"
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "sentencepiece_model"
METRICS_FILE = "metrics.jsonl"
LOCK_FILE = "run.lock"
COMMITTED = "commit_success.txt"  # Orbax writes it last into a checkpoint in an object store
# The network's fields that may change between two starts of a run, since its parameters are the same. All others may
# not, those included that are added to the network later.
FREE_FIELDS = {"max_len", "dropout_rate", "attention_dropout_rate", "dtype", *MANNER}
# Fields of a recipe of which a change is not worth a word: what is reported, when and where, and samples.
SILENT_FIELDS = {
    "log_every_steps", "eval_every_steps", "num_predict_steps", "checkpoint_every_steps", "checkpoint_every_minutes",
    "keep_checkpoints", "prompts", "max_predict_length", "sampling_temperature", "sampling_top_k", "sampling_top_p",
    "prepare_processes", "prepared_dir", "save_checkpoints", "restore_checkpoints", "init_from", "mesh_fsdp",
    "mesh_tensor", "gradient_accumulation_steps", "attention", "remat",
}  # fmt: skip
TOKENIZER_FIELDS = {"vocab_size", "spm_train_options", "max_corpus_chars"}  # read when it is trained, once


def check_workdir(workdir: epath.Path, recipe: dict, network: TransformerConfig, tokenizer: Tokenizer, rows: list[str]):
    """Says what has changed since the run before, where the workdir holds one; the arguments are `write_config`'s.

    Raises:
      UserError: its checkpoints are of another network or tokenizer, which a run would spoil, or a change can have no
        effect. Without a config.json nothing but the tokenizer can be compared; the network is when they are read.
    """
    if not has_checkpoints(workdir):
        return
    if (workdir / CONFIG_FILE).exists():
        before, fingerprint = read_run_config(workdir)
        check_same_network(str(workdir), before, network)
        content = read_json(workdir / CONFIG_FILE)
        _report_changes(workdir, content.get("recipe"), recipe, content.get("rows"), rows)
    elif (workdir / TOKENIZER_FILE).exists():
        fingerprint = Tokenizer.load(workdir / TOKENIZER_FILE).fingerprint
    else:
        return
    if fingerprint != tokenizer.fingerprint:
        raise UserError(f"{workdir} holds a model of another tokenizer; restore that, or use another --workdir.")


def write_config(
    workdir: epath.Path,
    recipe: dict,
    network: TransformerConfig,
    tokenizer: Tokenizer,
    rows: list[str],
    batch: dict[str, int],
):
    """Writes config.json and sentencepiece_model, before the first step.

    Args:
      workdir: the folder of the run.
      recipe: its fields, for the record.
      network: the network as it is.
      tokenizer: the tokenizer of its rows.
      rows: names of the folders of prepared rows that it reads.
      batch: its rows a step, which `remembered_batch` finds at the next start.
    """
    content = {
        "recipe": recipe,
        "model": network.to_json(),
        "tokenizer_sha256": tokenizer.fingerprint,
        "rows": rows,
        "batch": batch,
    }
    write_atomically(workdir / TOKENIZER_FILE, tokenizer.model)
    write_atomically(workdir / CONFIG_FILE, json_bytes(content))


def has_checkpoints(workdir: epath.Path) -> bool:
    """Whether a run has saved something here; what an interrupted first save left does not count."""
    found = [child for child in children(workdir / CHECKPOINTS_DIR) if child.name.isdigit()]
    return any(not is_remote(child) or (child / COMMITTED).exists() for child in found)


def _read_run(workdir: epath.Path) -> dict:
    """The config.json of a run that has saved something, {} where there is none."""
    is_run = has_checkpoints(workdir) and (workdir / CONFIG_FILE).exists()
    return read_json(workdir / CONFIG_FILE) if is_run else {}


def remembered_batch(workdir: epath.Path, recipe: dict) -> dict[str, int]:
    """The rows a step that a run had before, {} for a new run; those alone that the recipe has not changed since."""
    content = _read_run(workdir)
    batch, before = content.get("batch"), content.get("recipe")
    if not isinstance(batch, dict) or not isinstance(before, dict):
        return {}
    depends = {
        "rows": ("per_device_batch_size",),
        "eval_rows": ("per_device_batch_size", "eval_per_device_batch_size"),
    }
    return {
        name: batch[name]
        for name, fields in depends.items()
        if isinstance(batch.get(name), int)
        and batch[name] > 0
        and all(before.get(field) == recipe[field] for field in fields)
    }


def remembered_rows(workdir: epath.Path, recipe: dict) -> list[str]:
    """The names of the rows that a run had before, [] for a new run, or one that reads another field of its sources."""
    content = _read_run(workdir)
    before = content.get("recipe")
    if not isinstance(before, dict) or before.get("text_field") != recipe["text_field"]:
        return []
    return names_of_rows(content) or []


def names_of_rows(content: dict) -> list[str] | None:
    """The names of folders of rows in a config.json that may be anybody's, without paths; None where it has none."""
    rows = content.get("rows")
    if not isinstance(rows, list):
        return None
    return [name for name in rows if isinstance(name, str) and name == epath.Path(name).name not in ("", "..")]


def _report_changes(workdir: epath.Path, before: Any, recipe: dict, rows_before: Any, rows: list[str]):
    """Logs each field of the recipe that is not what it was, and what follows; refuses what would have no effect."""
    before = before if isinstance(before, dict) else {}
    recipe = json.loads(json_bytes(recipe))  # which has lists for tuples
    changed = {name for name in before.keys() & recipe.keys() if before[name] != recipe[name]} - SILENT_FIELDS
    for name in sorted(changed & TOKENIZER_FIELDS):
        if recipe.get("vocab_path") is None:
            raise UserError(
                f"{name}={recipe[name]!r} cannot be meant: {workdir} holds a model whose tokenizer was made with "
                f"{before[name]!r}; keep that, or use another --workdir."
            )
    for name in sorted(changed):
        logging.info("%s was %r before and is %r now.", name, before[name], recipe[name])
    if "seed" in changed:
        logging.warning("With another seed the data have another order: rows may be read twice, or not in this epoch.")
    if rows_before and rows_before != rows:
        logging.warning("The rows are others than before: reading goes on in them at the same place.")


def check_same_network(place: str, before: TransformerConfig, network: TransformerConfig):
    """Raises UserError where the model at a place has other parameters than the run's."""
    for name in sorted(vars(network).keys() - FREE_FIELDS):
        old, new = getattr(before, name), getattr(network, name)
        if old != new:
            raise UserError(
                f"{place} holds a model with {name}={old}, but this run has {name}={new}; "
                "use its value, or name another."
            )


def read_run_config(workdir: epath.Path) -> tuple[TransformerConfig, str]:
    """The network and the tokenizer's hash in a workdir's config.json; raises UserError if it is not such a file."""
    path = workdir / CONFIG_FILE
    content = read_json(path)
    return TransformerConfig.from_json(content.get("model"), str(path)), content.get("tokenizer_sha256", "")


def has_turns(workdir: epath.Path) -> bool:
    """Whether a workdir's model was trained on conversations, by the recipe in its config.json."""
    recipe = read_json(workdir / CONFIG_FILE).get("recipe")
    return isinstance(recipe, dict) and recipe.get("conversations") is True
