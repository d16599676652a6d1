"""What a workdir knows of its model: recipe, data, scores. For the model card."""

import contextlib
import re
from typing import Any

from etils import epath

from transformer_lm import files
from transformer_lm.checkpoints import hub
from transformer_lm.checkpoints import workdir as contract
from transformer_lm.checkpoints.workdir import CONFIG_FILE, METRICS_FILE, SILENT_FIELDS
from transformer_lm.data import input_pipeline, rows
from transformer_lm.tokenizer import Tokenizer

# Fields of a recipe that nobody needs who uses the model: where things lie, how often a run reports, what it is asked
# for as a sample. All others are shown.
UNSHOWN_FIELDS = SILENT_FIELDS | {
    "vocab_path", "dataset_name", "train_split", "eval_dataset_name", "eval_split", "streaming", "text_field",
    "eval_per_device_batch_size", "max_eval_target_length", "num_eval_steps",
}  # fmt: skip
ROWS_OF_TEXTS = 100  # of each corpus
SCORES = ("eval_loss", "eval_perplexity", "eval_accuracy", "eval_bits_per_char", "eval_bits_per_byte",
          "instruction_accuracy")  # fmt: skip


def read_facts(address: str, step: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """What is known at an address; empty where nothing is.

    That is `recipe`, `data` (manifests of the rows), `texts` (some of the rows'), `scores` and `prompt`.

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
        return {"recipe": {}, "data": [], "texts": [], "scores": {}, "prompt": None}
    corpora = _corpora(workdir, recipe, contract.names_of_rows(content), tokenizer)
    shown = {name: value for name, value in recipe.items() if name not in UNSHOWN_FIELDS}
    if options := shown.get("spm_train_options"):  # without the folder of a file
        shown["spm_train_options"] = re.sub(r"(--normalization_rule_tsv=)\S*/", r"\1", str(options))
    return {
        "recipe": shown,
        "data": [corpus.manifest for corpus in corpora],
        "texts": [text for corpus in corpora for text in _texts(corpus, tokenizer)],
        "scores": _last_scores(workdir / METRICS_FILE, step),
        "prompt": str(recipe.get("prompts", "")).split("\n")[0],
    }


def _corpora(
    workdir: epath.Path, recipe: dict, names: list[str] | None, tokenizer: Tokenizer
) -> list[rows.PreparedCorpus]:
    """The rows that the run read, each once; in old workdirs, which name none, those that fit.

    Rows whose manifest is damaged count as gone.
    """
    prepared = files.absolute(str(recipe.get("prepared_dir") or workdir / "prepared"))
    folders = files.children(prepared) if names is None else [prepared / name for name in dict.fromkeys(names)]
    corpora = [rows.PreparedCorpus(folder, manifest) for folder in folders if (manifest := rows.read_manifest(folder))]
    if names is not None:
        return corpora
    return [
        corpus
        for split in dict.fromkeys(recipe.get(name) for name in ("train_split", "eval_split"))
        for corpus in corpora
        if corpus.manifest["split"] == split and corpus.manifest.get("tokenizer_sha256") == tokenizer.fingerprint
    ]


def _texts(corpus: rows.PreparedCorpus, tokenizer: Tokenizer) -> list[str]:
    """Texts of a corpus's first rows; none where they lie elsewhere, are gone, damaged or another tokenizer's."""
    if files.is_remote(corpus.directory) or corpus.manifest.get("tokenizer_sha256") != tokenizer.fingerprint:
        return []
    with contextlib.suppress(Exception):  # whatever damaged rows make a library raise
        return input_pipeline.first_texts(corpus, tokenizer, ROWS_OF_TEXTS)
    return []


def _last_scores(path: epath.Path, step: int) -> dict[str, Any]:
    """The last evaluation up to a step; what is no number counts as none: null, or what was edited."""
    last = {}
    for record in files.read_json_lines(path):
        if "eval_loss" in record and _is_number(record.get("step")) and record["step"] <= step:
            last = record
    return {name: last[name] for name in ("step", *SCORES) if _is_number(last.get(name))}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
