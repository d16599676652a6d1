"""Evaluate a trained model: on any corpus, or on the tasks of lm-evaluation-harness.

python3 evaluate.py --workdir=logs/japanese_0.1b_v1 --config.eval_dataset_name="jsonl:$HOME/heldout.jsonl.gz" \
    --config.eval_split=train --config.num_eval_steps=-1
python3 evaluate.py --workdir=logs/japanese_0.1b_v1 --tasks=jglue --tasks_data=$HOME/JGLUE/datasets

--workdir is all that generate_text.py takes: a workdir, an original checkpoint, an exported folder, hf://OWNER/NAME.

On a corpus: loss, perplexity, accuracy, bits a character and a byte. Of the recipe (without --config the workdir's own)
what counts is the evaluation corpus and how it is read, max_eval_target_length, eval_per_device_batch_size,
num_eval_steps and use_bfloat16. Rows are looked for, and made, in prepared_dir, the workdir's prepared/ or the user's
cache.

With --tasks, what each task measures; of the recipe only use_bfloat16 counts. The project's own tasks are in tasks/.

Standard output gets one JSON object.
"""

import dataclasses
import json
import logging as python_logging

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from transformer_lm import cli, files, recipe
from transformer_lm.checkpoints import hub
from transformer_lm.data import preparation
from transformer_lm.extras import optional_import
from transformer_lm.generation import language_model
from transformer_lm.training import sharding
from transformer_lm.training.config import Recipe
from transformer_lm.training.evaluation import evaluate_rows
from transformer_lm.training.step import make_eval_step

_TASKS = flags.DEFINE_list(
    "tasks", None, "Tasks of lm-evaluation-harness; jglue: the three of which data are published."
)
_TASKS_DATA = flags.DEFINE_string("tasks_data", None, "Folder with JGLUE's files; JGLUE_DIR says it, too.")
_INCLUDE_PATH = flags.DEFINE_string("include_path", None, "Folder with task files of your own.")
_NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "Worked examples before each question; unset for the task's own."
)
_LIMIT = flags.DEFINE_integer("limit", None, "How many questions of each task are asked; unset for all.")
_SAMPLES = flags.DEFINE_string("samples", None, "File (JSON lines) for every question, answer and score.")


def main(config: ConfigDict, workdir: str):
    """Evaluates on tasks, if any are named, or else on the recipe's evaluation corpus; prints."""
    chosen = recipe.read(config)
    model = language_model.load(workdir, dtype=chosen.network.dtype)
    values = evaluate_tasks(model) if _TASKS.value else evaluate_corpus(model, chosen, workdir)
    print(json.dumps({"step": model.step, **values}))


def evaluate_corpus(model: language_model.LanguageModel, chosen: Recipe, workdir: str) -> dict[str, float]:
    """Prepares the rows, unless they are there, and evaluates on them."""
    beside = epath.Path(workdir) / "prepared"
    has_rows = not hub.is_address(workdir) and beside.exists()
    root = files.absolute(chosen.data.prepared_dir or (beside if has_rows else files.cache_folder() / "prepared"))
    rows = preparation.prepare_evaluation(chosen.data, model.tokenizer, root)
    mesh = sharding.make_mesh()
    config = dataclasses.replace(model.config, max_len=max(model.config.max_len, rows.row_length))
    params = jax.device_put(model.params, sharding.replicated(mesh))
    return evaluate_rows(jax.jit(make_eval_step(config)), params, rows, chosen.train, mesh)


def evaluate_tasks(model: language_model.LanguageModel) -> dict[str, dict]:
    """{"tasks": {task: {metric: value}}} of the tasks named by the flags."""
    optional_import("lm_eval", "eval", "--tasks")
    for name in ("lm_eval", "datasets"):
        python_logging.getLogger(name).setLevel(python_logging.ERROR)
    from transformer_lm.evaluation import harness

    found = harness.run_tasks(
        model,
        _TASKS.value,
        data_dir=_TASKS_DATA.value,
        include_path=_INCLUDE_PATH.value,
        num_fewshot=_NUM_FEWSHOT.value,
        limit=_LIMIT.value,
    )
    if _SAMPLES.value:
        lines = [
            json.dumps({"task": task, **sample}, ensure_ascii=False, default=str) + "\n"
            for task, samples in found["samples"].items()
            for sample in samples
        ]
        files.write_atomically(files.absolute(_SAMPLES.value), "".join(lines).encode())
    return {"tasks": {task: harness.plain_metrics(metrics) for task, metrics in found["results"].items()}}


if __name__ == "__main__":
    cli.run(main, needs_config=False)
