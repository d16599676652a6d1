"""How many characters a token stands for, by kind, size and options of the tokenizer.

python benchmarks/tokenizer_choices.py --folder=FOLDER [--json=FILE] [--only=REGEX] [--max_chars=10000000]

FOLDER holds aozora_train.jsonl.gz (literature, to train on), aozora_validation.jsonl.gz and wikipedia_leads.jsonl.gz,
lines with a field "text". Measured on the validation file and on every other article of the leads. Tokenizers of the
corpus "both" have also seen the other articles, as a third of their text (each many times: there are few of them).
What the file of results has already is not made again.
"""

import gzip
import itertools
import json
import re
import time
from pathlib import Path

import numpy as np
import rich.console
from absl import app, flags
from rich.table import Table
from sentencepiece import sentencepiece_model_pb2

from transformer_lm import console, files
from transformer_lm.data import tokenizer_training
from transformer_lm.tokenizer import Tokenizer

_FOLDER = flags.DEFINE_string("folder", None, "Folder with the corpora.", required=True)
_JSON = flags.DEFINE_string("json", None, "File that results are added to.")
_ONLY = flags.DEFINE_string("only", "", "Regular expression that names of tokenizers must match.")
_MAX_CHARS = flags.DEFINE_integer("max_chars", 10_000_000, "Characters that a tokenizer learns from at most.")

# Of every tokenizer here: nothing is unknown, and texts are kept as they are.
COMMON = {"byte_fallback": "true", "character_coverage": "0.9995", "normalization_rule_name": "identity",
          "remove_extra_whitespaces": "false", "add_dummy_prefix": "false", "num_threads": "2"}  # fmt: skip
LEADS_SHARE, LEADS_TIMES = 1 / 3, 40
KINDS = ("bpe", "unigram")
SIZES = (8_000, 16_000, 32_000, 64_000)
OPTIONS = {
    "nfkc": {"normalization_rule_name": "nfkc"},
    "a space in front": {"add_dummy_prefix": "true"},
    "across scripts": {"split_by_unicode_script": "false"},
    "digits alone": {"split_digits": "true"},
    "pieces of 8 at most": {"max_sentencepiece_length": "8"},
    "coverage 0.999": {"character_coverage": "0.999"},
    "coverage 0.9999": {"character_coverage": "0.9999"},
}


def tokenizers() -> dict[str, tuple[str, int, dict[str, str]]]:
    """Name -> (corpus, pieces, options): every kind in every size, and of 32,000 pieces one option changed."""
    made = {}
    for corpus, size, kind in itertools.product(("literature", "both"), SIZES, KINDS):
        if size <= 32_000 or corpus == "both":
            made[f"{corpus} {kind} {size}"] = corpus, size, {"model_type": kind}
    for kind, (name, options) in itertools.product(KINDS, OPTIONS.items()):
        made[f"both {kind} 32000, {name}"] = "both", 32_000, {"model_type": kind} | options
    return made


def read(name: str) -> list[str]:
    """The texts of a file."""
    with gzip.open(Path(_FOLDER.value, f"{name}.jsonl.gz"), "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def train(corpus: str, size: int, options: dict[str, str]) -> Tokenizer:
    """A tokenizer of a corpus."""
    literature = read("aozora_train")
    mixture = [(literature, 1.0)]
    if corpus == "both":
        mixture = [(literature, 1 - LEADS_SHARE), (read("wikipedia_leads")[::2] * LEADS_TIMES, LEADS_SHARE)]
    given = " ".join(f"--{name}={value}" for name, value in (COMMON | options).items())
    return Tokenizer(tokenizer_training.train(mixture, size, _MAX_CHARS.value, given))


def measure(spm: Tokenizer, texts: list[str]) -> dict[str, float]:
    """Characters a token, and the share of tokens that are single bytes."""
    tokens = np.concatenate([ids[:-1] for ids in spm.encode_texts(texts)])  # without EOS
    pieces = sentencepiece_model_pb2.ModelProto.FromString(spm.model).pieces
    is_byte = np.array([piece.type == piece.BYTE for piece in pieces])
    return {
        "chars_per_token": sum(map(len, texts)) / len(tokens),
        "bytes": float(is_byte[tokens].mean()),
    }


def run(corpus: str, size: int, options: dict[str, str]) -> dict:
    """Trains and measures."""
    start = time.perf_counter()
    spm = train(corpus, size, options)
    return {
        "seconds": time.perf_counter() - start,
        "literature": measure(spm, read("aozora_validation")),
        "leads": measure(spm, read("wikipedia_leads")[1::2]),
    }


def table_of(results: dict[str, dict]) -> Table:
    """What was found, for people."""
    columns = ("tokenizer", "literature", "Wikipedia leads", "bytes of the leads' tokens", "seconds to train")
    table = Table(*columns, title="characters a token")
    for name, result in results.items():
        figures = [f"{result[text]['chars_per_token']:.3f}" for text in ("literature", "leads")]
        table.add_row(name, *figures, f"{result['leads']['bytes']:.2%}", f"{result['seconds']:.0f}")
    return table


def main(argv):
    """Makes what is missing, and prints the table."""
    del argv
    console.set_up(debug=False)
    path = Path(_JSON.value) if _JSON.value else None
    results = json.loads(path.read_text()) if path and path.exists() else {}
    for name, chosen in tokenizers().items():
        if name not in results and re.search(_ONLY.value, name):
            results[name] = run(*chosen)
            if path:
                files.write_atomically(path, files.json_bytes(results))
    rich.console.Console(width=120).print(table_of(results))


if __name__ == "__main__":
    app.run(main)
