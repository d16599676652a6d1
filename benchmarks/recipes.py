"""What each ingredient of the v2 recipes brings: runs of a small network, in bits a character after so many tokens.

python benchmarks/recipes.py --literature=FOLDER [--only=v1,v2] [--seeds=0,1,2] [--large] [--results=docs/recipes.json]

FOLDER holds aozora_train.jsonl.gz and aozora_validation.jsonl.gz, lines with a field "text"; without one the runs are
on tales alone, whose entropy is known. Runs that the results have already are not made again. candidates.py has the
networks that no recipe offers; docs/recipes.py draws the tables and curves of docs/recipes.md from the results.
"""

import contextlib
import functools
import json
import tempfile
import time
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import optax
from absl import app, flags, logging
from candidates import NETWORKS

from transformer_lm import models, recipe
from transformer_lm.configs import base, mukashi, v2
from transformer_lm.data import input_pipeline, preparation
from transformer_lm.tokenizer import START_ID
from transformer_lm.training import loop, muon, optimizers

_LITERATURE = flags.DEFINE_string("literature", None, "Folder with aozora_{train,validation}.jsonl.gz.")
_ONLY = flags.DEFINE_list("only", [], "Names of runs; all by default.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of each run.")
_LARGE = flags.DEFINE_bool("large", False, "Networks of 12 x 768 on literature instead; for a GPU.")
_RESULTS = flags.DEFINE_string("results", "recipes.json", "File that results are added to.")
_CACHE = flags.DEFINE_string("cache", None, "Folder for tokenizer and rows; by default a temporary one.")

# 4 layers x 192, 6,000 pieces, 16 rows of 128 tokens: a run takes minutes on 2 cores.
SIZE = {
    "vocab_size": 6000, "max_corpus_chars": 2_000_000, "emb_dim": 192, "qkv_dim": 192, "mlp_dim": 768, "num_heads": 3,
    "num_layers": 4, "max_target_length": 128, "max_eval_target_length": 128, "per_device_batch_size": 16,
    "eval_per_device_batch_size": 64, "use_bfloat16": False, "num_eval_steps": -1, "save_checkpoints": False,
    "restore_checkpoints": False, "log_every_steps": 20, "eval_every_steps": 10**9, "prompts": "昔",
    "max_predict_length": 8,
}  # fmt: skip
# 12 layers x 768, 30,000 pieces, 128 rows of 256 tokens.
LARGE_SIZE = SIZE | {
    "vocab_size": 30_000, "max_corpus_chars": 10_000_000, "emb_dim": 768, "qkv_dim": 768, "mlp_dim": 3072,
    "num_heads": 12, "num_layers": 12, "max_target_length": 256, "max_eval_target_length": 256,
    "per_device_batch_size": 128, "gradient_accumulation_steps": 4, "eval_per_device_batch_size": 64,
    "use_bfloat16": True,
}  # fmt: skip
UNIGRAM = "--character_coverage=0.9995 --byte_fallback=true"
AS_IT_IS = f"{UNIGRAM} --normalization_rule_name=identity --remove_extra_whitespaces=false"
BPE = f"{AS_IT_IS} --model_type=bpe"
GATED = 512  # mlp_dim of a gated MLP with as many parameters as 768 without a gate

FULL, THIRD, SIXTH, TENTH = 400, 133, 67, 40  # steps, of 2,048 tokens
V1 = {"learning_rate": 0.0016, "warmup_steps": 100}  # the original's, and a warm-up for so few steps
NO_DROPOUT = {"dropout_rate": 0.0, "attention_dropout_rate": 0.0}
NARROW = {"emb_dim": 96, "qkv_dim": 96, "mlp_dim": 256, "num_heads": 2}
WIDE = {"emb_dim": 384, "qkv_dim": 384, "mlp_dim": 1024, "num_heads": 6}
FEW_ROWS = {"per_device_batch_size": 4}


def rates(*, adam: float, muon: float = 1.0) -> dict:
    """The v2 recipe's learning rates, times something."""
    config = v2.get_config()
    names = {"embedding_learning_rate": adam, "head_learning_rate": adam, "learning_rate": muon}
    return {name: factor * config[name] for name, factor in names.items()}


# Name: recipe, steps, and fields that are not the recipe's. All schedules follow the number of steps. No fields are
# the names of STAND_INS: "batches", what is done to the rows of training and evaluation, "network", and "matrices",
# what computes in Muon's place. Tokenizers of other sizes have as many steps as take as many FLOPs.
LITERATURE: dict[str, tuple[str, int, dict]] = {
    "v1": ("v1", FULL, {}),
    "v1 with half its rate": ("v1", FULL, {"learning_rate": 0.0008}),
    "v1 with twice its rate": ("v1", FULL, {"learning_rate": 0.0032}),
    "v1 with four times its rate": ("v1", FULL, {"learning_rate": 0.0064}),
    "v1 without dropout": ("v1", FULL, NO_DROPOUT),
    "v1 without dropout linear 0.001": ("v1", FULL, NO_DROPOUT | {"schedule": "wsd", "learning_rate": 0.001}),
    "v1 without dropout linear 0.002": ("v1", FULL, NO_DROPOUT | {"schedule": "wsd", "learning_rate": 0.002}),
    "v1 without dropout linear 0.004": ("v1", FULL, NO_DROPOUT | {"schedule": "wsd", "learning_rate": 0.004}),
    "v1 without dropout linear 0.002 decay 0.01": (
        "v1",
        FULL,
        NO_DROPOUT | {"schedule": "wsd", "learning_rate": 0.002, "weight_decay": 0.01},
    ),
    "v1 without dropout linear 0.002 decay 0.3": (
        "v1",
        FULL,
        NO_DROPOUT | {"schedule": "wsd", "learning_rate": 0.002, "weight_decay": 0.3},
    ),
    "v2/10": ("v2", TENTH, {}),
    "v2/6": ("v2", SIXTH, {}),
    "v2/3": ("v2", THIRD, {}),
    "v2": ("v2", FULL, {}),
    "v2/6 with AdamW at 0.001 for all": ("v2", SIXTH, {"optimizer": "adamw", "learning_rate": 0.001}),
    "v2/6 with AdamW at 0.002 for all": ("v2", SIXTH, {"optimizer": "adamw", "learning_rate": 0.002}),
    "v2/6 with AdamW": ("v2", SIXTH, {"optimizer": "adamw", "learning_rate": 0.004}),
    "v2/6 with Adam for matrices 0.001": ("v2", SIXTH, {"matrices": "adam", "learning_rate": 0.001}),
    "v2/6 with Adam for matrices 0.002": ("v2", SIXTH, {"matrices": "adam", "learning_rate": 0.002}),
    "v2/6 with Adam for matrices 0.004": ("v2", SIXTH, {"matrices": "adam", "learning_rate": 0.004}),
    "v2/6 with Adam for matrices 0.001 for as long": ("v2", 74, {"matrices": "adam", "learning_rate": 0.001}),
    "v2/3 with Adam for matrices 0.001": ("v2", THIRD, {"matrices": "adam", "learning_rate": 0.001}),
    "v2/3 with Adam for matrices 0.002": ("v2", THIRD, {"matrices": "adam", "learning_rate": 0.002}),
    "v2 with Adam for matrices 0.002": ("v2", FULL, {"matrices": "adam", "learning_rate": 0.002}),
    "v2/6 with sinusoids": ("v2", SIXTH, {"positions": "sinusoidal"}),
    "v2/6 with LayerNorm": ("v2", SIXTH, {"norm": "layer"}),
    "v2/6 without QK-norm": ("v2", SIXTH, {"qk_norm": False}),
    "v2/6 without zero init": ("v2", SIXTH, {"zero_init": False}),
    "v2/6 with biases": ("v2", SIXTH, {"use_bias": True}),
    "v2/6 with ReLU": ("v2", SIXTH, {"mlp": "relu", "mlp_dim": 768}),
    "v2/6 with ReLU squared": ("v2", SIXTH, {"mlp": "relu_squared", "mlp_dim": 768}),
    "v2/6 with heads of 32": ("v2", SIXTH, {"num_heads": 6}),
    "v2/6 with heads of 96": ("v2", SIXTH, {"num_heads": 2}),
    "v2/6 with one head of keys and values": ("v2", SIXTH, {"num_kv_heads": 1}),
    "v2/6 with soft cap 15": ("v2", SIXTH, {"logits_soft_cap": 15.0}),
    "v2/6 with texts as they are": ("v2", SIXTH, {"spm_train_options": AS_IT_IS}),
    "v2/6 with BPE": ("v2", SIXTH, {"spm_train_options": BPE}),
    "v2/6 with BPE across scripts": ("v2", SIXTH, {"spm_train_options": f"{BPE} --split_by_unicode_script=false"}),
    "v2/6 with BPE and NFKC": ("v2", SIXTH, {"spm_train_options": BPE.replace("identity", "nfkc")}),
    "v2/6 with BPE of single digits": ("v2", SIXTH, {"spm_train_options": f"{BPE} --split_digits=true"}),
    "v2/6 with BPE of short pieces": ("v2", SIXTH, {"spm_train_options": f"{BPE} --max_sentencepiece_length=8"}),
    "v2/6 with BPE of 8k": ("v2", 60, {"spm_train_options": BPE, "vocab_size": 8_000}),
    "v2/6 with BPE of 12k": ("v2", 49, {"spm_train_options": BPE, "vocab_size": 12_000}),
    "v2/6 with BPE of 24k": ("v2", 32, {"spm_train_options": BPE, "vocab_size": 24_000}),
    "v2/6 with BPE of 32k": ("v2", 26, {"spm_train_options": BPE, "vocab_size": 32_000}),
    "v2/6 with BPE of 64k": ("v2", 15, {"spm_train_options": BPE, "vocab_size": 64_000, "log_every_steps": 5}),
    "v2/6 with rests that begin anew": ("v2", SIXTH, {"batches": "anew"}),
    "v2/6 with attention across documents": ("v2", SIXTH, {"batches": "across"}),
    "v2/6 tied": ("v2", SIXTH, {"logits_via_embedding": True}),
    "v2/6 with dropout": ("v2", SIXTH, {"dropout_rate": 0.1, "attention_dropout_rate": 0.1}),
    "v2/6 with Muon 0.01": ("v2", SIXTH, {"learning_rate": 0.01}),
    "v2/6 with Muon 0.04": ("v2", SIXTH, {"learning_rate": 0.04}),
    "v2/6 with rsqrt": ("v2", SIXTH, {"schedule": "rsqrt"}),
    "v2/6 with cosine": ("v2", SIXTH, {"schedule": "cosine"}),
    "v2/6 of width 96": ("v2", SIXTH, NARROW),
    "v2/6 of width 96 with Adam's rates x 1.4": ("v2", SIXTH, NARROW | rates(adam=2**0.5)),
    "v2/6 of width 384": ("v2", SIXTH, WIDE),
    "v2/6 of width 384 with Adam's rates x 0.7": ("v2", SIXTH, WIDE | rates(adam=0.5**0.5)),
    "v2/6 of 4 rows a step": ("v2", 4 * SIXTH, FEW_ROWS),
    "v2/6 of 4 rows a step with rates x 0.5": ("v2", 4 * SIXTH, FEW_ROWS | rates(adam=0.5, muon=0.5)),
    "v2/6 with x0": ("v2", SIXTH, {"network": "x0"}),
    "v2/6 with value embeddings": ("v2", SIXTH, {"network": "values"}),
    "v2/6 with smear": ("v2", SIXTH, {"network": "smear"}),
}


def large_v2(times: float = 1.0) -> dict:
    """What v2's rules say of LARGE_SIZE, with all learning rates times something."""
    config = v2.get_config()
    config.vocab_size = LARGE_SIZE["vocab_size"]
    v2.set_size(config, layers=12, width=768, row_length=256, rows=128)
    rates = {name: times * config[name] for name in ("learning_rate", "embedding_learning_rate", "head_learning_rate")}
    return rates | {name: config[name] for name in ("mlp_dim", "weight_decay", "decay_share")}


LARGE_FULL = 420  # steps, of 32,768 tokens: the corpus once
LARGE: dict[str, tuple[str, int, dict]] = {
    "v1": ("v1", LARGE_FULL, {}),
    "v1 without dropout linear 0.001": ("v1", LARGE_FULL, NO_DROPOUT | {"schedule": "wsd", "learning_rate": 0.001}),
    "v2/6": ("v2", LARGE_FULL // 6, large_v2()),
    "v2/6 with rates x 2": ("v2", LARGE_FULL // 6, large_v2(2)),
    "v2/6 with rates x 4": ("v2", LARGE_FULL // 6, large_v2(4)),
    "v2/3": ("v2", LARGE_FULL // 3, large_v2(2)),
    "v2": ("v2", LARGE_FULL, large_v2(2)),
}
# The demo as it was with v1, whose numbers were chosen for it, and as it is.
V1_TALES = NO_DROPOUT | {"per_device_batch_size": 2, "num_heads": 6, "learning_rate": 0.003}
TALES = {
    "v1": ("v1", 3000, V1_TALES),
    "v1 linear 0.00075": ("v1", 3000, V1_TALES | {"schedule": "wsd", "learning_rate": 0.00075}),
    "v1 linear 0.0015": ("v1", 3000, V1_TALES | {"schedule": "wsd", "learning_rate": 0.0015}),
    "v1 linear 0.003": ("v1", 3000, V1_TALES | {"schedule": "wsd"}),
    "v1 linear 0.006": ("v1", 3000, V1_TALES | {"schedule": "wsd", "learning_rate": 0.006}),
    "v2": ("v2", 500, {"per_device_batch_size": 8}),
    "v2 for as long as v1": ("v2", 600, {"per_device_batch_size": 8}),
    "v2 of half the steps": ("v2", 250, {"per_device_batch_size": 8}),
}


def begin_anew(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What is left of a long text begins with id 0, as a document does, rather than with the token before it."""
    return batch | {"inputs": np.where(batch["positions"] == 0, START_ID, batch["inputs"])}


def join_documents(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each row is one text to attention, whatever documents are in it."""
    positions = np.broadcast_to(np.arange(batch["positions"].shape[1], dtype=np.int32), batch["positions"].shape)
    return batch | {"segments": np.minimum(batch["segments"], 1), "positions": positions}


BATCHES = {"": lambda batch: batch, "anew": begin_anew, "across": join_documents}
MATRICES = {"": muon.scale_by_muon, "adam": functools.partial(optax.scale_by_adam, 0.9, 0.95)}
STAND_INS = {"batches": BATCHES, "network": NETWORKS, "matrices": MATRICES}


def corpora() -> dict[str, tuple[dict, dict]]:
    """The corpora that there are: their runs, and their fields."""
    found = {"mukashi": (TALES, tales())}
    if not _LITERATURE.value:
        return found
    folder = Path(_LITERATURE.value)
    literature = {
        "dataset_name": f"jsonl:{folder / 'aozora_train.jsonl.gz'}",
        "eval_dataset_name": f"jsonl:{folder / 'aozora_validation.jsonl.gz'}",
        "train_split": "train[:10%]",
        "eval_split": "train[:10%]",
        "spm_train_options": UNIGRAM,
    }
    if _LARGE.value:
        whole = {"train_split": "train", "eval_split": "train"}
        return {"literature, 12 x 768": (LARGE, literature | LARGE_SIZE | whole)}
    return {"literature": (LITERATURE, literature)} | found


def tales() -> dict:
    """What the demo's recipe says of its corpus and its sizes."""
    config = mukashi.get_config()
    names = (
        "vocab_size", "max_corpus_chars", "spm_train_options", "dataset_name", "train_split", "eval_split",
        "max_target_length", "max_eval_target_length", "num_layers",
    )  # fmt: skip
    return {name: config[name] for name in names}


def fields_of(kind: str, steps: int, changes: dict, corpus: dict, seed: int, cache: Path):
    """The recipe of a run."""
    config = (base if kind == "v1" else v2).get_config()
    own = V1 if kind == "v1" else {"mlp_dim": GATED}
    fields = {name: value for name, value in changes.items() if name not in STAND_INS}
    config.update(SIZE | own | corpus | fields | {"num_train_steps": steps, "seed": seed})
    tokenizer = f"{config.vocab_size} {config.spm_train_options}"
    config.vocab_path = str(cache / f"sentencepiece_model_{zlib.crc32(tokenizer.encode()):08x}")
    config.prepared_dir = str(cache)
    return config


@contextlib.contextmanager
def changed(changes: dict):
    """While a run has other rows, another network, or another optimizer of matrices."""
    change, network, scale = (table[changes.get(name, "")] for name, table in STAND_INS.items())
    read = input_pipeline.read_records
    models._abstract.cache_clear()
    models._made.clear_cache()
    with (
        mock.patch.object(input_pipeline, "read_records", lambda *arguments: change(read(*arguments))),
        mock.patch.object(models, "TransformerLM", network),
        mock.patch.object(optimizers, "scale_by_muon", scale),
    ):
        yield


def run(config, workdir: str) -> dict:
    """Trains, and says what came of it."""
    chosen = recipe.read(config)
    data = preparation.prepare(chosen.data, workdir)
    start = time.perf_counter()
    loop.train_and_evaluate(chosen, data, workdir)
    lines = [json.loads(line) for line in Path(workdir, "metrics.jsonl").read_text().splitlines()]
    speeds = sorted(line["step_seconds"] for line in lines if "step_seconds" in line)
    return {
        "bits_per_char": next(line["eval_bits_per_char"] for line in lines[::-1] if "eval_bits_per_char" in line),
        "step_seconds": speeds[len(speeds) // 2],
        "steps": chosen.train.num_train_steps,
        "tokens": chosen.train.num_train_steps * chosen.train.per_device_batch_size * chosen.data.max_target_length,
        "seconds": time.perf_counter() - start,
        "parameters": models.count_params(chosen.network),
        "train": [(line["step"], line["train_loss"]) for line in lines if "train_loss" in line],
    }


def main(_):
    """All runs that are asked for and not there yet."""
    path = Path(_RESULTS.value)
    results = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for corpus, (runs, fields) in corpora().items():
            cache = Path(_CACHE.value or folder) / corpus
            for seed in map(int, _SEEDS.value):
                for name in _ONLY.value or runs:
                    key = f"{corpus}: {name}: {seed}"
                    if key in results or name not in runs:
                        continue
                    config = fields_of(*runs[name], fields, seed, cache)
                    with tempfile.TemporaryDirectory() as workdir, changed(runs[name][2]):
                        results[key] = run(config, workdir)
                    logging.info("%s: %.4f bits a character", key, results[key]["bits_per_char"])
                    path.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    logging.set_verbosity(logging.INFO)
    app.run(main)
