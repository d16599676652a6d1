"""The model card of an exported model, Japanese and English: what the workdir knows of the recipe, data and scores."""

import json
from typing import Any

from etils import epath

from transformer_lm import __version__, files, models
from transformer_lm.checkpoints import hub
from transformer_lm.checkpoints import store as checkpoints
from transformer_lm.data import preparation
from transformer_lm.models import TransformerConfig
from transformer_lm.tokenizer import Tokenizer

PROJECT = "transformer-lm-japanese"
PROMPT = "夏目漱石は、"
# Of a recipe what another may want to know; paths and how often a run reports are nobody's business.
RECIPE_FIELDS = (
    "num_layers", "emb_dim", "qkv_dim", "mlp_dim", "num_heads", "logits_via_embedding", "dropout_rate",
    "attention_dropout_rate", "spm_train_options", "preprocessor", "unicode_normalization", "cleaning_rules",
    "max_target_length", "per_device_batch_size", "learning_rate", "warmup_steps", "weight_decay", "label_smoothing",
    "num_train_steps", "use_bfloat16", "seed",
)  # fmt: skip
DATA_FIELDS = ("documents", "characters", "bytes", "tokens")
SCORES = ("eval_loss", "eval_perplexity", "eval_accuracy", "eval_bits_per_char", "eval_bits_per_byte")


def write(name: str, address: str, model: TransformerConfig, step: int, tokenizer: Tokenizer) -> str:
    """The card of the model `name` that was loaded from `address`; leaves out what is not known there."""
    facts = _facts(address, step, tokenizer)
    parts = [_FRONT_MATTER, f"# {name}\n"]
    for words in (_JAPANESE, _ENGLISH):
        parts.append(
            words["about"].format(
                project=PROJECT, version=__version__, parameters=f"{models.count_params(model) / 1e6:,.1f}",
                layers=model.num_layers, emb=model.emb_dim, vocab=f"{model.vocab_size:,}", step=f"{step:,}",
            )
        )  # fmt: skip
        if facts["scores"]:
            parts.append(_section(words["scores"], _table(facts["scores"])))
        if facts["data"]:
            parts.append(_section(words["data"], _data_table(facts["data"])))
        if facts["recipe"]:
            recipe = json.dumps(facts["recipe"], ensure_ascii=False, indent=1)
            parts.append(_section(words["recipe"], f"```json\n{recipe}\n```"))
        parts.append(
            _section(
                words["use"],
                _USE.format(name=name, where=words["where"], prompt=json.dumps(facts["prompt"], ensure_ascii=False)),
            )
        )
    return "\n".join(parts)


def _facts(address: str, step: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a workdir knows: recipe, manifests of its rows, scores of the last evaluation, a prompt."""
    workdir = epath.Path(address)
    config = workdir / checkpoints.CONFIG_FILE
    recipe = {} if hub.is_address(address) or not config.exists() else files.read_json(config).get("recipe", {})
    if not recipe:
        return {"recipe": {}, "data": [], "scores": {}, "prompt": PROMPT}
    prepared = files.absolute(recipe.get("prepared_dir") or workdir / "prepared")
    manifests = [
        files.read_json(path) for folder in files.children(prepared) if (path := folder / preparation.MANIFEST).exists()
    ]
    return {
        "recipe": {name: recipe[name] for name in RECIPE_FIELDS if name in recipe},
        "data": [
            manifest
            for split in ("train_split", "eval_split")
            for manifest in manifests
            if manifest.get("split") == recipe.get(split) and manifest["tokenizer_sha256"] == tokenizer.fingerprint
        ],
        "scores": _last_scores(workdir / "metrics.jsonl", step),
        "prompt": recipe.get("prompts", PROMPT).split("\n")[0],
    }


def _last_scores(path: epath.Path, step: int) -> dict[str, Any]:
    """The last evaluation up to a step."""
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    found = [line for line in lines if "eval_loss" in line and line["step"] <= step]
    return {name: found[-1][name] for name in ("step", *SCORES) if name in found[-1]} if found else {}


def _section(title: str, content: str) -> str:
    return f"## {title}\n\n{content}\n"


def _table(values: dict[str, Any]) -> str:
    rows = [
        f"| {name} | {value:.4g} |" if name != "step" else f"| step | {value:,} |" for name, value in values.items()
    ]
    return "\n".join(["| | |", "|:-|-:|", *rows])


def _data_table(manifests: list[dict]) -> str:
    rows = [
        f"| {_public_name(manifest['dataset_name'])} | {manifest['split']} | "
        + " | ".join(f"{manifest[name]:,}" for name in DATA_FIELDS)
        + " |"
        for manifest in manifests
    ]
    return "\n".join([f"| dataset | split | {' | '.join(DATA_FIELDS)} |", "|:-|:-|-:|-:|-:|-:|", *rows])


def _public_name(dataset: str) -> str:
    """A dataset's name without the folders of the machine that it lay on."""
    kind, colon, place = dataset.partition(":")
    return f"{kind}:{place.rsplit('/', 1)[-1]}" if colon and kind != "huggingface" else dataset


_FRONT_MATTER = """---
language: ja
library_name: transformers
pipeline_tag: text-generation
tags:
- transformer-lm-japanese
---
"""

_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "{name}"  # {where}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
inputs = tokenizer([{prompt}], return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True)[0])
```

```python
import transformer_lm

model = transformer_lm.load("{name}")  # hf://OWNER/{name}
print(model.generate({prompt})[0]["text"])
```"""

_JAPANESE = {
    "about": "[日本語](#使い方) / [English](#how-to-use)\n\n"
    "{project} の事前学習済み日本語言語モデルです（{version} で書き出し）。{layers} 層、幅 {emb}、語彙 {vocab}、"
    "パラメータ {parameters} 百万、学習 {step} ステップ。指示には従わず、文章の続きを書きます。"
    "学習データにある誤りや偏りをそのまま書くことがあります。\n",
    "scores": "評価",
    "data": "学習と評価に使ったデータ",
    "recipe": "学習の設定",
    "use": "使い方",
    "where": "このフォルダ、またはハブの OWNER/NAME",
}

_ENGLISH = {
    "about": "A pretrained Japanese language model of {project} (exported by {version}): {layers} layers of width "
    "{emb}, {vocab} pieces, {parameters} million parameters, {step} steps. It follows no instructions: it continues "
    "texts, and may repeat what is wrong or biased in its training data.\n",
    "scores": "Evaluation",
    "data": "Data of training and evaluation",
    "recipe": "Recipe",
    "use": "How to use",
    "where": "this folder, or OWNER/NAME on the hub",
}
