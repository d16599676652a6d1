"""Draws curves and prints the tables of docs/recipes.md from the results of benchmarks/recipes.py (extra `docs`).

python docs/recipes.py docs/recipes.json docs/recipes.svg
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt

TOKENS = 2048  # of a step
CURVES = ("v1", "v1, tuned", "v2/6", "v2/3", "v2")


def main(results: str, picture: str):
    """One table a corpus, and one picture."""
    corpora: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for key, result in json.loads(Path(results).read_text()).items():
        corpus, name, _ = key.split(": ")
        corpora[corpus][name].append(result)
    figure, axes = plt.subplots(1, len(corpora), figsize=(4.5 * len(corpora), 3.4), layout="constrained", squeeze=False)
    for axis, (corpus, runs) in zip(axes[0], corpora.items(), strict=True):
        print(f"\n{corpus}\n")
        print("| run | tokens | bits a character | seeds | step, of v1's | parameters |\n|:-|-:|-:|-:|-:|-:|")
        first = statistics.median(result["step_seconds"] for result in runs["v1"])
        for name, found in runs.items():
            bits = [result["bits_per_char"] for result in found]
            spread = f" ± {statistics.stdev(bits):.3f}" if len(bits) > 1 else ""
            step = statistics.median(result["step_seconds"] for result in found) / first
            print(
                f"| {name} | {found[0]['steps'] * TOKENS:,} | {statistics.mean(bits):.3f}{spread} | {len(bits)} "
                f"| {step:.2f} | {found[0]['parameters']:,} |"
            )
            if name in CURVES:
                steps, losses = zip(*found[0]["train"], strict=True)
                axis.plot([step * TOKENS for step in steps], losses, label=name)
        axis.set(title=corpus, xlabel="tokens", ylabel="training loss, nats a token")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
