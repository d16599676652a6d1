"""The model card of an exported model, Japanese and English: what the workdir knows of the recipe, data and scores."""

import json
import os
import re
from typing import Any

from transformer_lm import models
from transformer_lm.tokenizer.turns import Turns
from transformer_lm.transformer_config import TransformerConfig
from transformer_lm.version import __version__

PROJECT = "transformer-lm-japanese"
PROMPT = "夏目漱石は、"
ENGLISH_DATASETS = {"lm1b"}
DATA_FIELDS = ("documents", "characters", "bytes", "tokens")


def write(name: str, network: TransformerConfig, step: int, facts: dict[str, Any], turns: Turns | None = None) -> str:
    """The card of the model `name`; `facts`, as `read_facts` gives them, may be empty where none are known.

    `turns` is how the model takes turns in a conversation; None where it takes none.
    """
    code = json.dumps(name, ensure_ascii=not name.isprintable())  # bytes that are not UTF-8 are escaped in Python, too
    title = " ".join(name.encode(errors="replace").decode().split())
    prompt = json.dumps(facts["prompt"] or PROMPT, ensure_ascii=False)
    recipe = json.dumps(facts["recipe"], ensure_ascii=False, indent=1)
    datasets = {re.split("[/:]", manifest["dataset_name"])[0] for manifest in facts["data"]}
    language = "en" if datasets and datasets <= ENGLISH_DATASETS else "ja"
    parts = [_FRONT_MATTER.format(language=language), f"# {title}\n"]
    for words in (_JAPANESE, _ENGLISH):
        about = words["about"].format(
            project=PROJECT, version=__version__, parameters=f"{models.count_params(network) / 1e6:,.1f}",
            layers=network.num_layers, emb=network.emb_dim, vocab=f"{network.vocab_size:,}", step=f"{step:,}",
            manner=words["answers" if turns else "continues"], language=words[language],
        )  # fmt: skip
        sections = {
            "scores": _score_table(facts["scores"]),
            "data": _data_table(facts["data"]),
            "recipe": f"```json\n{recipe}\n```",
            "use": (_TALK if turns else _USE).format(
                name=code, title=title, where=words["where"], prompt=prompt, **_end_of_turn(turns)
            ),
        }
        known = {name: content for name, content in sections.items() if name == "use" or facts[name]}
        parts += [about, *(f"## {words[name]}\n\n{content}\n" for name, content in known.items())]
    return "\n".join(parts)


def _end_of_turn(turns: Turns | None) -> dict[str, str]:
    """How code goes on that generates an answer, and that shows one, where the turn's end is a word of the text."""
    if not turns or not turns.sign:
        return {"stop": "", "cut": ""}
    stop = "" if turns.exported_end_ids else f', stop_strings=["{turns.sign}"], tokenizer=tokenizer'
    return {"stop": stop, "cut": f'.partition("{turns.sign}")[0].strip()'}


def _score_table(scores: dict[str, Any]) -> str:
    rows = [_row(name, f"{value:,}" if name == "step" else f"{value:.4g}") for name, value in scores.items()]
    return "\n".join(["| | |", "|:-|-:|", *rows])


def _data_table(manifests: list[dict]) -> str:
    rows = [_row("dataset", "split", *DATA_FIELDS), "|:-|:-|-:|-:|-:|-:|"]
    for manifest in manifests:
        counts = [f"{manifest[name]:,}" for name in DATA_FIELDS]
        rows.append(_row(_public_name(manifest["dataset_name"]), manifest["split"], *counts))
    return "\n".join(rows)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _public_name(dataset: str) -> str:
    """A dataset's name without the folders of the machine that it lay on."""
    kind, colon, place = dataset.partition(":")
    is_folder = place[:1] in ("/", "~", ".") or os.path.isdir(place.rpartition(":")[0] or place)
    is_of_the_hub = kind == "huggingface" and not is_folder
    return dataset if is_of_the_hub or not colon else f"{kind}:{place.rstrip('/').rsplit('/', 1)[-1]}"


_FRONT_MATTER = """---
language: {language}
library_name: transformers
pipeline_tag: text-generation
tags:
- transformer-lm-japanese
---
"""

_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {name}  # {where}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
inputs = tokenizer([{prompt}], return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True)[0])
```

```python
import transformer_lm

model = transformer_lm.load({name})  # hf://OWNER/{title}
print(model.generate({prompt})[0]["text"])
```"""

_TALK = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {name}  # {where}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
messages = [{{"role": "user", "content": {prompt}}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs{stop})[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True){cut})
```

```python
import transformer_lm

model = transformer_lm.load({name})  # hf://OWNER/{title}
print(model.chat([{{"role": "user", "content": {prompt}}}]))
```"""

_JAPANESE = {
    "about": "[日本語](#使い方) / [English](#how-to-use)\n\n"
    "{project} の{language}言語モデルです（{version} で書き出し）。{layers} 層、幅 {emb}、語彙 {vocab}、"
    "パラメータ {parameters} 百万、学習 {step} ステップ。{manner}"
    "学習データにある誤りや偏りをそのまま書くことがあります。\n",
    "ja": "日本語",
    "en": "英語の",
    "continues": "指示には従わず、文章の続きを書きます。",
    "answers": "会話を学習していて、質問や指示に答えます。",
    "scores": "評価",
    "data": "学習と評価に使ったデータ",
    "recipe": "学習の設定",
    "use": "使い方",
    "where": "このフォルダ、またはハブの OWNER/NAME",
}

_ENGLISH = {
    "about": "{language} language model of {project} (exported by {version}): {layers} layers of width {emb}, {vocab} "
    "pieces, {parameters} million parameters, {step} steps. {manner}, and may repeat what is wrong or biased in its "
    "training data.\n",
    "ja": "A Japanese",
    "en": "An English",
    "continues": "It follows no instructions: it continues texts",
    "answers": "It was trained on conversations: it answers questions and instructions",
    "scores": "Evaluation",
    "data": "Data of training and evaluation",
    "recipe": "Recipe",
    "use": "How to use",
    "where": "this folder, or OWNER/NAME on the hub",
}
