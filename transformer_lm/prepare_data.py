"""Prepare tokenizer and packed rows, and nothing else: for a machine without an accelerator, say.

python3 prepare_data.py --workdir=logs/japanese_0.1b_v1 --config=configs/japanese_0.1b_v1.py [--config.field=value ...]
"""

from transformer_lm import cli, preparation
from transformer_lm.recipe import Recipe


def main(recipe: Recipe, workdir: str):
    """Makes what main.py would make before its first step."""
    preparation.prepare(recipe.data, workdir)


if __name__ == "__main__":
    cli.run(main)
