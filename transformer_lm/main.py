"""Train a language model, preparing tokenizer and data first where they are missing.

python3 main.py --workdir=logs/japanese_0.1b_v1 --config=configs/japanese_0.1b_v1.py [--config.field=value ...]
"""

from transformer_lm import cli
from transformer_lm.checkpoints import store as checkpoints
from transformer_lm.data import preparation
from transformer_lm.recipe import Recipe
from transformer_lm.training import loop as train


def main(recipe: Recipe, workdir: str):
    """Runs the recipe in the workdir."""
    initial_tokenizer = checkpoints.initial_tokenizer(recipe.init_from, recipe.model, workdir)
    data = preparation.prepare(recipe.data, workdir, tokenizer_source=initial_tokenizer)
    train.train_and_evaluate(recipe, data, workdir)


if __name__ == "__main__":
    cli.run(main)
