"""Draws curves and prints the tables of docs/recipes.md from the results of benchmarks/recipes.py (extra `docs`).

python docs/recipes.py docs/recipes.json docs/recipes.svg
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt

from transformer_lm.data.corpora import mukashi

CURVES = ("v1", "v2/6", "v2/3", "v2", "v2 of half the steps")
LEAST = {"mukashi": mukashi.bits_per_char()}  # what no model can do better than, where it is known


def main(results: str, picture: str):
    """One table a corpus, and one picture."""
    corpora: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for key, result in json.loads(Path(results).read_text()).items():
        corpus, name, _ = key.split(": ")
        corpora[corpus][name].append(result)
    figure, axes = plt.subplots(1, len(corpora), figsize=(4.5 * len(corpora), 3.4), layout="constrained", squeeze=False)
    for axis, (corpus, runs) in zip(axes[0], corpora.items(), strict=True):
        print(f"\n{corpus}\n")
        least = LEAST.get(corpus, 0.0)
        measure = f"bits a character above {least:.4f}" if least else "bits a character"
        print(f"| run | tokens | {measure} | seeds | parameters |\n|:-|-:|-:|-:|-:|")
        for name, found in runs.items():
            bits = [result["bits_per_char"] - least for result in found]
            digits = 4 if least else 3
            spread = f" ± {statistics.stdev(bits):.{digits}f}" if len(bits) > 1 else ""
            mean = f"{statistics.mean(bits):.{digits}f}{spread}"
            print(f"| {name} | {found[0]['tokens']:,} | {mean} | {len(bits)} | {found[0]['parameters']:,} |")
            if name in CURVES:
                steps, losses = zip(*found[0]["train"], strict=True)
                tokens = found[0]["tokens"] / found[0]["steps"]  # of a step
                axis.plot([step * tokens for step in steps], losses, label=name)
        axis.set(title=corpus, xlabel="tokens", ylabel="training loss, nats a token")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
