"""Cleaning: each rule removes what it is for, and says so."""

import json

import pytest
from etils import epath
from real_datasets import write_jsonl

from transformer_lm.data import cleaning, corpora
from transformer_lm.data.corpora import mukashi
from transformer_lm.data.dataset_preprocessor import Preprocessing
from transformer_lm.data.launcher import Launcher
from transformer_lm.errors import UserError

pytest.importorskip("datatrove")
pytest.importorskip("hojichar")

TALES = [mukashi.tale(number) for number in range(60)]
DIRT = {
    "language": ["The quick brown fox jumps over the lazy dog. " * 10, "Лиса прыгает через собаку. " * 10],
    "length": ["短い文です。", "昔の話です。"],
    "sentences": ["ホーム、商品一覧、会社概要、お問い合わせ、サイトマップ" * 5],
    "symbols": ["★☆◆●" * 60 + "です。" * 20],
    "repetition": ["激安の通販です。\n今すぐ注文。\n" * 40, "あ" * 300 + "終わりです。" * 4],
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Tales with dirt of each kind and planted near-duplicates among them, in three files."""
    folder = tmp_path_factory.mktemp("web")
    copies = [tale.replace("昔々", "昔むかし", 1) + "（転載）" for tale in TALES[:5]] + [TALES[7], TALES[7]]
    texts = TALES + copies + [text for dirt in DIRT.values() for text in dirt]
    for i in range(3):
        write_jsonl(folder / f"{i}.jsonl", texts[i::3])
    return corpora.open_documents(f"jsonl:{folder}/*.jsonl", "train")


def clean(corpus, rules, folder, **launcher):
    directory = epath.Path(folder)
    cleaning.clean(corpus, Preprocessing(), cleaning.parse_rules(rules), directory, Launcher("local", **launcher))
    kept = list(corpora.open_documents(f"jsonl:{folder}/texts-*/*.jsonl.gz", "train"))
    return kept, json.loads((directory / cleaning.REPORT).read_text())


@pytest.mark.parametrize("rule", list(DIRT))
def test_each_rule_removes_what_it_is_for(corpus, rule, tmp_path):
    kept, report = clean(corpus, rule, tmp_path)
    assert not set(DIRT[rule]) & set(kept)
    assert set(TALES) <= set(kept)
    counts = report["counts"]
    assert counts["kept"] == len(kept)
    assert counts["texts"] - len(kept) == counts["removed"][rule] >= len(DIRT[rule])
    examples = report["examples"][rule]
    assert any(dirt.startswith(example[:20]) for example in examples for dirt in DIRT[rule])


def test_all_rules_and_near_duplicates(corpus, tmp_path):
    """What is left is the tales: of each planted copy and its original exactly one."""
    rules = ",".join((*DIRT, "minhash"))
    kept, report = clean(corpus, rules, tmp_path / "1")
    assert len(kept) == len(TALES)
    assert set(TALES[8:]) <= set(kept)
    assert report["counts"]["removed"]["minhash"] == 7
    assert report["counts"]["kept"] == len(TALES)
    assert len(report["examples"]["minhash"]) > 0
    assert sorted(path.name for path in (tmp_path / "1").iterdir()) == [
        "examples-1",
        "logs-1",
        "report.json",
        "texts-1",
    ]
    others, same = clean(corpus, rules, tmp_path / "3", tasks=3, workers=2)
    assert len(others) == len(TALES)
    assert same["counts"] == report["counts"]


def test_interrupted_and_gone_on_with_other_tasks(corpus, tmp_path):
    """What a killed task, or another number of tasks, has left behind is not taken for cleaned."""
    left = [tmp_path / name for name in ("texts-5", "filtered-5", "texts-2", "filtered-2")]
    for folder in left:
        folder.mkdir()
        (folder / "00001.jsonl.gz").write_bytes(b"half a fi")
    kept, _ = clean(corpus, "length,minhash", tmp_path, tasks=2, workers=1)
    assert len(kept) == len(set(kept))
    assert not (tmp_path / "texts-5").exists()


def test_nothing_left(corpus, tmp_path):
    with pytest.raises(UserError, match=r"cleaning_rules.* removed every text"):
        clean(corpora.open_documents("mukashi", "validation[:0]"), "length,minhash", tmp_path)


@pytest.mark.parametrize("rules", ["grammar", "minhash,length"])
def test_impossible_rules(rules):
    with pytest.raises(UserError, match="cleaning_rules"):
        cleaning.parse_rules(rules)
