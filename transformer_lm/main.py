"""Train a language model, preparing tokenizer and data first where they are missing.

python3 main.py --workdir=logs/japanese_0.1b_v1 --config=configs/japanese_0.1b_v1.py [--config.field=value ...]
"""

from ml_collections import ConfigDict

from transformer_lm import cli, recipe
from transformer_lm.checkpoints import loading
from transformer_lm.data import preparation
from transformer_lm.errors import stage
from transformer_lm.training import loop


def main(config: ConfigDict, workdir: str):
    """Runs the recipe in the workdir."""
    chosen = recipe.read(config)
    initial = loading.find_initial(chosen.init_from, chosen.network, workdir)
    with stage("preparing data", lower="prepare_processes or max_corpus_chars"):
        data = preparation.prepare(chosen.data, workdir, tokenizer_source=initial and initial.tokenizer_path)
    with stage("training", lower="per_device_batch_size, max_target_length or the size of the network"):
        loop.train_and_evaluate(chosen, data, workdir)


if __name__ == "__main__":
    cli.run(main)
