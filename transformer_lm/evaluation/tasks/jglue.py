"""JGLUE's files (Kurihara et al. 2022, https://github.com/yahoojapan/JGLUE), read from a folder as they are published.

The folder is --tasks_data, or the environment variable JGLUE_DIR. Somewhere below it lies jnli-valid-v1.3.json or
jnli-v1.3/valid-v1.3.json, gzipped or not; of several versions the highest is taken. Prompts are version 0.3 ("Alpaca")
of the Japanese tasks in Stability AI's lm-evaluation-harness, without examples, as in the original's benchmark.
"""

import collections
import gzip
import json
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import datasets

from transformer_lm.errors import UserError


def jcommonsenseqa(data_dir: str | None = None, **_) -> dict[str, datasets.Dataset]:
    """Fields question, choices (five), label (which of them)."""
    return _dataset(
        {"question": line["question"], "choices": [line[f"choice{i}"] for i in range(5)], "label": line["label"]}
        for line in _lines("jcommonsenseqa", data_dir)
    )


def jnli(data_dir: str | None = None, **_) -> dict[str, datasets.Dataset]:
    """Fields sentence1, sentence2, label (entailment 0, contradiction 1, neutral 2)."""
    labels = ("entailment", "contradiction", "neutral")
    return _dataset(
        {"sentence1": line["sentence1"], "sentence2": line["sentence2"], "label": labels.index(line["label"])}
        for line in _lines("jnli", data_dir)
    )


def marc_ja(data_dir: str | None = None, **_) -> dict[str, datasets.Dataset]:
    """Fields text, label (positive 0, negative 1). The data are not published any more; who has them can use them."""
    labels = ("positive", "negative")
    return _dataset(
        {"text": line["text"], "label": labels.index(line["label"])} for line in _lines("marc_ja", data_dir)
    )


def jsquad(data_dir: str | None = None, **_) -> dict[str, datasets.Dataset]:
    """Fields id, context (without its title), question, answers (texts)."""
    path = _find("jsquad", data_dir)
    with _open(path) as file:
        articles = json.load(file)["data"]
    return _dataset(
        {
            "id": qa["id"],
            "context": paragraph["context"].split("[SEP]")[-1].strip(),
            "question": qa["question"],
            "answers": [answer["text"] for answer in qa["answers"]],
        }
        for article in articles
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    )


def score_answer(doc: dict, results: list[str]) -> dict[str, float]:
    """JSQuAD's scores of a generated answer: exact match, and F1 over characters, each of the gold answer nearest."""
    return {
        "exact_match": float(any(_plain(results[0]) == _plain(answer) for answer in doc["answers"])),
        "f1": max(_f1(_plain(results[0]), _plain(answer)) for answer in doc["answers"]),
    }


def _plain(text: str) -> str:
    """A text without what does not make it another answer: width, case, punctuation, white space."""
    text = unicodedata.normalize("NFKC", text).lower()
    return "".join(c for c in text if not c.isspace() and not unicodedata.category(c).startswith("P"))


def _f1(answer: str, gold: str) -> float:
    common = sum((collections.Counter(answer) & collections.Counter(gold)).values())
    if not common:
        return float(answer == gold)
    return 2 * common / (len(answer) + len(gold))


def _dataset(documents: Iterator[dict]) -> dict[str, datasets.Dataset]:
    return {"validation": datasets.Dataset.from_list(list(documents))}


def _lines(name: str, data_dir: str | None) -> Iterator[dict]:
    """The objects of a file with one a line."""
    with _open(_find(name, data_dir)) as file:
        yield from map(json.loads, file)


def _open(path: Path):
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8")


def _find(name: str, data_dir: str | None) -> Path:
    """The validation file of a dataset, of the highest version."""
    folder = data_dir or os.environ.get("JGLUE_DIR")
    if not folder:
        raise UserError(f"{name} needs JGLUE's files: name their folder by --tasks_data=FOLDER, or JGLUE_DIR.")
    pattern = re.compile(rf"{name}[-/](v[\d.]+/)?valid-v([\d.]+)\.json(\.gz)?")
    root = Path(folder).expanduser()
    paths = [(match[2].split("."), path) for path in root.rglob("*") if (match := pattern.search(str(path)))]
    if not paths:
        raise UserError(f"{folder} has no {name}-valid-vN.json nor {name}-vN/valid-vN.json of JGLUE, gzipped or not.")
    return max(paths)[1]
