"""Evaluate a trained model on any corpus: loss, perplexity, accuracy, bits a character and a byte.

python3 evaluate.py --workdir=logs/japanese_0.1b_v1 --config.eval_dataset_name="jsonl:$HOME/heldout.jsonl.gz" \
    --config.eval_split=train --config.num_eval_steps=-1

--workdir is all that generate_text.py takes: a workdir, an original checkpoint, hf://OWNER/NAME. Of the recipe (without
--config the workdir's own) what counts is the evaluation corpus and how it is read, max_eval_target_length,
eval_per_device_batch_size, num_eval_steps and use_bfloat16. Rows are looked for, and made, in prepared_dir, the
workdir's prepared/ or the user's cache. Standard output gets one JSON object.
"""

import dataclasses
import json

import jax
from etils import epath

from transformer_lm import cli, files, hub, language_model, preparation, sharding, train
from transformer_lm.recipe import Recipe


def main(recipe: Recipe, workdir: str):
    """Prepares the rows, unless they are there, evaluates, prints."""
    model = language_model.load(workdir, dtype=recipe.model.dtype)
    beside = epath.Path(workdir) / "prepared"
    has_rows = not hub.is_address(workdir) and beside.exists()
    root = files.absolute(recipe.data.prepared_dir or (beside if has_rows else files.cache_folder() / "prepared"))
    rows = preparation.prepare_evaluation(recipe.data, model.tokenizer, root)
    mesh = sharding.make_mesh()
    config = dataclasses.replace(model.config, max_len=max(model.config.max_len, rows.row_length))
    params = jax.device_put(model.params, sharding.replicated(mesh))
    values = train.evaluate_rows(jax.jit(train.make_eval_step(config)), params, rows, recipe.train, mesh)
    print(json.dumps({"step": model.step, **values}))


if __name__ == "__main__":
    cli.run(main, needs_config=False)
