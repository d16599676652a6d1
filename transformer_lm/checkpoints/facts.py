"""What a workdir knows of its model: recipe, data, scores. For the model card."""

from typing import Any

from etils import epath

from transformer_lm import files
from transformer_lm.checkpoints import hub
from transformer_lm.checkpoints import workdir as contract
from transformer_lm.checkpoints.workdir import CONFIG_FILE, METRICS_FILE, SILENT_FIELDS
from transformer_lm.data import rows
from transformer_lm.tokenizer import Tokenizer

# Fields of a recipe that nobody needs who uses the model: where things lie, how often a run reports, what it is asked
# for as a sample. All others are shown.
UNSHOWN_FIELDS = SILENT_FIELDS | {
    "vocab_path", "dataset_name", "train_split", "eval_dataset_name", "eval_split", "streaming", "text_field",
    "eval_per_device_batch_size", "max_eval_target_length", "num_eval_steps",
}  # fmt: skip
SCORES = ("eval_loss", "eval_perplexity", "eval_accuracy", "eval_bits_per_char", "eval_bits_per_byte",
          "instruction_accuracy")  # fmt: skip


def read_facts(address: str, step: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """What is known at an address: `recipe`, `data` (manifests of the rows), `scores`, `prompt`; empty where nothing.

    Args:
      address: where the model was loaded from.
      step: its training steps; later scores are not its own.
      tokenizer: its tokenizer; rows of another are not its own.
    """
    workdir = epath.Path(address)
    config = workdir / CONFIG_FILE
    content = {} if hub.is_address(address) or not config.exists() else files.read_json(config)
    recipe = content.get("recipe", {})
    if not recipe:
        return {"recipe": {}, "data": [], "scores": {}, "prompt": None}
    return {
        "recipe": {name: value for name, value in recipe.items() if name not in UNSHOWN_FIELDS},
        "data": _manifests(workdir, recipe, contract.names_of_rows(content), tokenizer),
        "scores": _last_scores(workdir / METRICS_FILE, step),
        "prompt": str(recipe.get("prompts", "")).split("\n")[0],
    }


def _manifests(workdir: epath.Path, recipe: dict, names: list[str] | None, tokenizer: Tokenizer) -> list[dict]:
    """The manifests of the rows that the run read, each once; in old workdirs, which name none, of those that fit.

    A manifest that is damaged counts as gone.
    """
    prepared = files.absolute(str(recipe.get("prepared_dir") or workdir / "prepared"))
    folders = files.children(prepared) if names is None else [prepared / name for name in dict.fromkeys(names)]
    manifests = [manifest for folder in folders if (manifest := rows.read_manifest(folder))]
    if names is not None:
        return manifests
    return [
        manifest
        for split in dict.fromkeys(recipe.get(name) for name in ("train_split", "eval_split"))
        for manifest in manifests
        if manifest.get("split") == split and manifest.get("tokenizer_sha256") == tokenizer.fingerprint
    ]


def _last_scores(path: epath.Path, step: int) -> dict[str, Any]:
    """The last evaluation up to a step; what is no number counts as none: null, or what was edited."""
    last = {}
    for record in files.read_json_lines(path):
        if "eval_loss" in record and _is_number(record.get("step")) and record["step"] <= step:
            last = record
    return {name: last[name] for name in ("step", *SCORES) if _is_number(last.get(name))}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
