"""The original's four recipes as they stand, but smaller in all that takes time, on data in real formats.

The datasets are small ones made by TFDS and in the hub's cache; nothing asks for a network.
"""

import json
import os
import sys

import pytest
from conftest import run
from real_datasets import make_hub_cache, make_tfds, parquet, wiki40b_document

from transformer_lm.data.corpora import mukashi

pytest.importorskip("tensorflow_datasets")
pytest.importorskip("datasets")

SHRUNK = {
    "num_layers": 1, "emb_dim": 16, "qkv_dim": 16, "mlp_dim": 16, "num_train_steps": 2,
    "num_heads": 2, "eval_every_steps": 2, "num_eval_steps": 1, "max_predict_length": 40, "prepare_processes": 1,
    "per_device_batch_size": 4, "eval_per_device_batch_size": 2, "max_target_length": 128,
    "max_eval_target_length": 256,
}  # fmt: skip


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tales = [mukashi.tale(number) for number in range(300)]
    articles = [wiki40b_document("昔話", *tale.split("。")) for tale in tales]
    make_tfds(folder / "tfds", "wiki40b/ja", {"train": articles, "validation": articles[:40], "test": articles[:5]})
    words = [
        f"The {a} {b} , said Mr. Smith of {c} ."
        for a in ("old", "new", "red", "big")
        for b in mukashi.WORDS
        for c in "ABCDEFG"
    ]
    make_tfds(folder / "tfds", "lm1b", {"train": words * 20, "test": words[:50]})
    lines = [f"{tale}\n" for tale in tales * 2]
    make_hub_cache(folder / "hf", "range3/cc100-ja", {"data/train-00000.parquet": parquet(lines)})
    return os.environ | {
        "TFDS_DATA_DIR": str(folder / "tfds"), "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "source", "preprocessor", "vocab_size"),
    [
        ("lm1b_default", "lm1b", "lm1b", 75),
        ("japanese_default_v1", "huggingface:cc100/lang=ja", "huggingface:cc100/lang=ja", 1200),
        ("japanese_0.1b_v1", "wiki40b/ja", "wiki40b/ja", 1200),
        ("japanese_1.0b_v1", "wiki40b/ja", "wiki40b/ja", 1200),
    ],
)
def test_recipe(name, source, preprocessor, vocab_size, environment, tmp_path):
    overrides = [f"--config.{field}={value}" for field, value in (SHRUNK | {"vocab_size": vocab_size}).items()]
    command = [sys.executable, "-m", "transformer_lm.main", f"--workdir={tmp_path}", f"--config=configs/{name}.py"]
    done = run([*command, *overrides], env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "eval_bits_per_char" in line] == [2]
    manifests = [json.loads(path.read_text()) for path in tmp_path.glob("prepared/*/manifest.json")]
    assert {manifest["dataset_name"] for manifest in manifests} == {source}
    assert {manifest["preprocessor"] for manifest in manifests} == {preprocessor}
    assert all(manifest["characters_per_token"] > 0.5 for manifest in manifests)
    # The small English tokenizer lacks letters of the prompt "I love to ".
    prompt = {"lm1b_default": "", "japanese_1.0b_v1": "日本の首都は"}.get(name, "昔々あるところに")
    assert f"Sample: {prompt}" in done.stderr
