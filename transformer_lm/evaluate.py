"""Evaluate a trained model: on any corpus, or on the tasks of lm-evaluation-harness.

python3 evaluate.py --workdir=logs/japanese_0.1b_v1 --config.eval_dataset_name="jsonl:$HOME/heldout.jsonl.gz" \
    --config.eval_split=train --config.num_eval_steps=-1
python3 evaluate.py --workdir=logs/japanese_0.1b_v1 --tasks=jglue --tasks_data=$HOME/JGLUE/datasets

--workdir is all that generate_text.py takes: a workdir, an original checkpoint, an exported folder, hf://OWNER/NAME.

On a corpus: loss, perplexity, accuracy, bits a character and a byte. Of the recipe (without --config the workdir's own)
what counts is the evaluation corpus and how it is read, max_eval_target_length, eval_per_device_batch_size,
num_eval_steps, use_bfloat16, and mesh_fsdp and mesh_tensor where the devices at hand can be such a mesh. Rows are
looked for in prepared_dir and the workdir's prepared/, and made in the user's cache, or in the prepared_dir that the
command line gives.

With --tasks, what each task measures; of the recipe only use_bfloat16 counts. The project's own tasks are in tasks/.
With --chat_template, each question is asked in a conversation, which the model must have been trained on.

Standard output gets one JSON object.
"""

import contextlib
import dataclasses
import json
import logging as python_logging
import math
import os
import sys

from absl import flags, logging
from etils import epath
from ml_collections import ConfigDict

from transformer_lm import cli, files, recipe
from transformer_lm.checkpoints import hub
from transformer_lm.checkpoints import workdir as contract
from transformer_lm.data import preparation
from transformer_lm.data.rows import PreparedRows
from transformer_lm.errors import UserError, stage
from transformer_lm.extras import optional_import
from transformer_lm.fields import LARGEST
from transformer_lm.generation import language_model
from transformer_lm.tokenizer import Tokenizer
from transformer_lm.training import batching, sharding
from transformer_lm.training.config import Recipe, TrainConfig
from transformer_lm.training.evaluation import evaluate_network
from transformer_lm.transformer_config import TransformerConfig

_TASKS = flags.DEFINE_list("tasks", None, "Tasks of lm-evaluation-harness; jglue: the three whose data are published.")
_TASKS_DATA = flags.DEFINE_string("tasks_data", None, "Folder with JGLUE's files; JGLUE_DIR says it, too.")
_INCLUDE_PATH = flags.DEFINE_string("include_path", None, "Folder with task files of your own.")
_NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "Worked examples before each question; unset for the task's own.", 0, LARGEST
)
_LIMIT = flags.DEFINE_integer("limit", None, "How many questions of each task are asked; unset for all.", 1, LARGEST)
_SAMPLES = flags.DEFINE_string("samples", None, "File (JSON lines) for every question, answer and score.")
_CHAT = flags.DEFINE_bool(
    "chat_template", None, "Ask in a conversation, of models that were trained on some; unset for plain prompts."
)
_OF_TASKS = (_CHAT, _TASKS_DATA, _INCLUDE_PATH, _NUM_FEWSHOT, _LIMIT, _SAMPLES)


def main(config: ConfigDict, workdir: str):
    """Evaluates on tasks, if any are named, or else on the recipe's evaluation corpus; prints."""
    _check_flags()
    chosen = recipe.read(config)
    with contextlib.redirect_stdout(sys.stderr):  # for what libraries print
        model = language_model.load(workdir, dtype=chosen.network.dtype)
        if _TASKS.value:
            values = evaluate_tasks(model)
        else:
            with stage("evaluating", lower="eval_per_device_batch_size or max_eval_target_length"):
                values = evaluate_corpus(model, chosen, workdir)
    print(json.dumps(_without_nan({"step": model.step, **values}), allow_nan=False))


def _check_flags():
    """Raises UserError for what would be found out after long work, or be of no use."""
    if _TASKS.value is None:
        for flag in _OF_TASKS:
            if flag.value is not None:
                raise UserError(f"--{flag.name}={flag.value} is about tasks: name some by --tasks.")
    elif not any(name.strip() for name in _TASKS.value):
        raise UserError("--tasks= names no task.")
    for flag in (_TASKS_DATA, _INCLUDE_PATH):
        if flag.value is not None and not os.path.isdir(os.path.expanduser(flag.value)):
            raise UserError(f"--{flag.name}={flag.value}: no such folder.")
    if _SAMPLES.value is not None:
        with stage(f"trying whether --samples={_SAMPLES.value} can be written"):
            path = files.absolute(_SAMPLES.value)
            if path.is_dir():
                raise UserError(f"--samples={_SAMPLES.value} is a folder; name a file.")
            files.write_atomically(path.with_name(f"{path.name}.trial"), b"")
            path.with_name(f"{path.name}.trial").unlink()


def _without_nan(values):
    """Values with null for what JSON has no number for: NaN and infinity."""
    if isinstance(values, dict):
        return {name: _without_nan(value) for name, value in values.items()}
    return None if isinstance(values, float) and not math.isfinite(values) else values


def evaluate_corpus(model: language_model.LanguageModel, chosen: Recipe, workdir: str) -> dict[str, float]:
    """Prepares the rows, unless they are there, and evaluates on them."""
    rows = _rows(model.tokenizer, chosen, workdir)
    network = dataclasses.replace(model.network, max_len=max(model.network.max_len, rows.row_length))
    layout = _layout(chosen.train, network)
    batch_size, max_rows = batching.plan_evaluation(chosen.train, layout)
    return evaluate_network(network, model.params, rows, layout, batch_size=batch_size, max_rows=max_rows)


def _layout(train: TrainConfig, network: TransformerConfig) -> sharding.Layout:
    """The recipe's mesh where it is one of the devices at hand, which may be others than those that trained."""
    with contextlib.suppress(UserError):
        layout = sharding.make_layout(train.mesh_fsdp, train.mesh_tensor)
        layout.check(network)
        return layout
    logging.info("The devices are not the recipe's mesh: each of them holds the whole network.")
    return sharding.make_layout(1, 1)


def _rows(tokenizer: Tokenizer, chosen: Recipe, workdir: str) -> PreparedRows:
    """The evaluation rows.

    A workdir's own recipe, which may be a stranger's, says where they may lie already, but not where they are made: to
    its corpus, which could be any file here, it could else add a place that others read.
    """
    data = chosen.data
    if data.prepared_dir and cli.is_said("prepared_dir"):
        return preparation.prepare_evaluation(data, tokenizer, files.absolute(data.prepared_dir))
    of_hub = hub.is_address(workdir)
    kept = () if of_hub else contract.remembered_rows(epath.Path(workdir), chosen.fields)
    for place in filter(None, (data.prepared_dir, None if of_hub else epath.Path(workdir) / "prepared")):
        try:
            if found := preparation.find_evaluation(data, tokenizer, files.absolute(place), kept):
                return found
        except OSError as error:
            logging.info("%s cannot be looked into: %s", place, error)
    return preparation.prepare_evaluation(data, tokenizer, files.absolute(files.cache_folder() / "prepared"))


def evaluate_tasks(model: language_model.LanguageModel) -> dict[str, dict]:
    """{"tasks": {task: {metric: value}}} of the tasks named by the flags."""
    optional_import("lm_eval", "eval", "--tasks")
    for name in ("lm_eval", "datasets"):
        python_logging.getLogger(name).setLevel(python_logging.ERROR)
    from transformer_lm.evaluation import harness

    found = harness.run_tasks(
        model, [name for name in _TASKS.value if name.strip()], data_dir=_TASKS_DATA.value,
        include_path=_INCLUDE_PATH.value and os.path.expanduser(_INCLUDE_PATH.value),
        num_fewshot=_NUM_FEWSHOT.value, limit=_LIMIT.value, chat=bool(_CHAT.value),
    )  # fmt: skip
    if _SAMPLES.value:
        lines = [
            json.dumps({"task": task, **sample}, ensure_ascii=False, default=str) + "\n"
            for task, samples in found["samples"].items()
            for sample in samples
        ]
        files.write_atomically(files.absolute(_SAMPLES.value), "".join(lines).encode(errors="backslashreplace"))
    return {"tasks": {task: harness.plain_metrics(metrics) for task, metrics in found["results"].items()}}


if __name__ == "__main__":
    cli.run(main, needs_config=False)
