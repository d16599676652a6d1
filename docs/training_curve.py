"""Draws the training curve of a workdir; needs the extra `docs`.

python docs/training_curve.py logs/demo docs/training_curve.svg
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def main(workdir: str, picture: str):
    """Training and evaluation loss over steps; for tales also the bits a character that the grammar allows."""
    records = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    figure, (losses, bits) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name, style in (("train_loss", "-"), ("eval_loss", "o-")):
        points = [(record["step"], record[name]) for record in records if name in record]
        losses.plot(*zip(*points, strict=True), style, label=name, markersize=4)
    losses.set(xlabel="step", ylabel="nats a token")
    points = [(record["step"], record["eval_bits_per_char"]) for record in records if "eval_bits_per_char" in record]
    bits.plot(*zip(*points, strict=True), "o-", color="C1", label="eval_bits_per_char", markersize=4)
    bits.set(xlabel="step", ylabel="bits a character")
    summary = Path(workdir) / "summary.json"
    if summary.exists():
        source = json.loads(summary.read_text())["source_bits_per_char"]
        bits.axhline(source, color="gray", linestyle="--", label="the grammar's entropy")
    for axes in (losses, bits):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
