"""The demo: trains the recipe `mukashi` in logs/demo, reads what the model writes, and says how good it is.

python -m transformer_lm.demo

One that was interrupted goes on; one that came to its end begins afresh.
"""

import shutil
import time
from pathlib import Path

from transformer_lm import cli, models, recipe
from transformer_lm.configs import mukashi as config
from transformer_lm.data import preparation
from transformer_lm.data.corpora import mukashi
from transformer_lm.files import json_bytes, write_atomically
from transformer_lm.generation import language_model
from transformer_lm.training import loop, metrics
from transformer_lm.training.config import Recipe

WORKDIR = Path("logs/demo")
SUMMARY_FILE = "summary.json"
NUM_TALES = 3


def main(demo: Recipe, workdir: Path) -> bool:
    """Trains the recipe, prints tales and scores, leaves them in the workdir's summary; False where it was stopped."""
    if (workdir / SUMMARY_FILE).exists():
        shutil.rmtree(workdir)
    data = preparation.prepare(demo.data, str(workdir))
    start = time.perf_counter()
    if not loop.train_and_evaluate(demo, data, str(workdir)):
        return False
    train_seconds = time.perf_counter() - start

    model = language_model.load(workdir)
    texts = model.continue_texts(demo.prompts, demo.sampling, seed=demo.seed, num_samples=NUM_TALES)
    summary = {
        "eval_bits_per_char": metrics.read_last(workdir, "eval_bits_per_char"),
        "source_bits_per_char": mukashi.bits_per_char(),
        "train_seconds": train_seconds,
        "samples": [text["text"] for text in texts],
        "params": models.count_params(model.network),
    }
    write_atomically(workdir / SUMMARY_FILE, json_bytes(summary))

    print(f"\n{NUM_TALES} tales from {demo.prompts[0]}:\n")
    print("\n\n".join(summary["samples"]))
    ratio = summary["eval_bits_per_char"] / summary["source_bits_per_char"]
    print(
        f"\nBits a character on tales never seen: the model {summary['eval_bits_per_char']:.4f}, "
        f"the grammar itself {summary['source_bits_per_char']:.4f} (the least possible); {ratio:.2f} times."
        f"\n{summary['params']:,} parameters, trained for {train_seconds:.0f} s. All of it lies in {workdir}/."
    )
    return True


if __name__ == "__main__":
    cli.run_without_flags(__doc__, lambda: main(recipe.read(config.get_config()), WORKDIR))
