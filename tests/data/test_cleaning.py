"""Cleaning: each rule removes what it is for, and says so."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import command, one_line_error, run
from etils import epath
from real_datasets import write_jsonl
from test_preparation import data_config

from transformer_lm.data import cleaning, corpora, preparation
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


def clean(corpus, rules, folder, tasks=1, workers=1):
    directory = epath.Path(folder)
    launcher = Launcher("local", tasks=tasks, workers=workers)
    cleaning.clean(corpus, Preprocessing(), cleaning.parse_rules(rules), directory, launcher)
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


def test_interrupted_and_gone_on_with_other_tasks(corpus, tmp_path, caplog):
    """What a killed task, or another number of tasks, has left behind is not taken for cleaned."""
    left = [tmp_path / name for name in ("texts-5", "filtered-5", "texts-2", "filtered-2")]
    for folder in left:
        folder.mkdir()
        (folder / "00001.jsonl.gz").write_bytes(b"half a fi")
    kept, _ = clean(corpus, "length,minhash", tmp_path, tasks=2)
    assert len(kept) == len(set(kept))
    assert not (tmp_path / "texts-5").exists()
    assert "cleaned again" not in caplog.text


def test_nothing_left(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["短い文です。"])
    with pytest.raises(UserError, match=r"cleaning_rules.* removed every text"):
        clean(corpora.open_documents(f"jsonl:{tmp_path}/a.jsonl", "train"), "length,minhash", tmp_path / "w")


def test_an_edited_number_cleans_anew(tmp_path, monkeypatch):
    """As the error advises, where a rule has removed all."""
    write_jsonl(tmp_path / "a.jsonl", ["短い文です。", "もっと短い。"])
    config = data_config(
        dataset_name=f"jsonl:{tmp_path}/a.jsonl", train_split="train", eval_split="train", cleaning_rules="length",
        vocab_size=300, spm_train_options="--byte_fallback=true --hard_vocab_limit=false",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"removed every text.*numbers in cleaning\.py"):
        preparation.prepare(config, str(tmp_path / "w"))
    monkeypatch.setitem(cleaning.RULES, "length", {"DocumentLengthFilter": {"min_doc_len": 2, "max_doc_len": 100}})
    assert preparation.prepare(config, str(tmp_path / "w")).train.manifest["texts"] == 2


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory):
    """Rows and a tokenizer made of the tales, cleaned: their configuration, and the workdir with them."""
    folder = tmp_path_factory.mktemp("cleaned")
    write_jsonl(folder / "a.jsonl", TALES)
    config = data_config(
        dataset_name=f"jsonl:{folder}/a.jsonl", train_split="train[:40]", eval_split="train[40:]",
        cleaning_rules="length", vocab_size=900,
    )  # fmt: skip
    preparation.prepare(config, str(folder / "workdir"))
    return config, folder / "workdir"


@pytest.fixture
def tales_config(cleaned, tmp_path):
    """The configuration of what lies prepared in tmp_path."""
    config, workdir = cleaned
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    return config


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("texts-*/*.jsonl.gz", None),
        ("texts-*/*.jsonl.gz", lambda content: b""),
        ("texts-*/*.jsonl.gz", lambda content: content[:-9]),
        ("texts-*/*.jsonl.gz", lambda content: content[:99] + bytes([content[99] ^ 1]) + content[100:]),
        ("report.json", lambda content: b""),
        ("report.json", lambda content: content[:99]),
        ("report.json", lambda content: b"{}"),
    ],
    ids=["gone", "empty", "cut", "changed", "report-empty", "report-cut", "no-report"],
)
def test_texts_damaged_later_are_cleaned_again(tales_config, tmp_path, pattern, damage, caplog):
    """Though the logs of the work say that all is done; what is whole stays as it is."""
    before = preparation.prepare(tales_config, str(tmp_path)).train
    before.directory.rmtree()
    path = next(path for path in tmp_path.glob(f"prepared/cleaned-*/{pattern}"))
    content = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage(content))
    after = preparation.prepare(tales_config, str(tmp_path)).train
    assert after.manifest["characters"] == before.manifest["characters"]
    assert caplog.text.count("something is damaged, and is cleaned again") == 1
    changed = path.stat().st_mtime_ns
    preparation.prepare(tales_config, str(tmp_path))
    assert path.stat().st_mtime_ns == changed


def test_an_older_report_without_checksums_is_taken(tales_config, tmp_path, caplog):
    preparation.prepare(tales_config, str(tmp_path))
    for path in tmp_path.glob("prepared/cleaned-*/report.json"):
        report = json.loads(path.read_text())
        assert report.pop("checksums")
        path.write_text(json.dumps(report))
    preparation.prepare(tales_config, str(tmp_path))
    assert "cleaned again" not in caplog.text


@pytest.mark.parametrize("rules", ["grammar", "minhash,length"])
def test_impossible_rules(rules):
    with pytest.raises(UserError, match="cleaning_rules"):
        cleaning.parse_rules(rules)


def test_characters_that_no_text_may_hold(tmp_path):
    """They are mended before any rule sees them, and counted."""
    lines = [json.dumps({"text": f"昔々{mark}あるところに。" * 20}) for mark in ("\ud83d", "\0", "")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    documents = corpora.open_documents(f"jsonl:{tmp_path}/a.jsonl", "train")
    kept, report = clean(documents, "length", tmp_path / "w")
    assert kept == ["昔々\ufffdあるところに。" * 20, "昔々あるところに。" * 20, "昔々あるところに。" * 20]
    assert (report["counts"]["nul_characters"], report["counts"]["lone_surrogates"]) == (20, 20)


def test_folders_of_any_name(corpus, tmp_path):
    """Such as datatrove takes for a pattern, which would match other folders, are refused."""
    kept, report = clean(corpus, "length,minhash", tmp_path / "100% %20 日本語 {a,b} #")
    assert len(kept) == report["counts"]["kept"] > len(TALES)
    for name in ("a[1]", "run*", "a?", "a::b", "\udc83"):
        with pytest.raises(UserError, match="prepared_dir"):
            clean(corpus, "length,minhash", tmp_path / name)


@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_shown(tmp_path, processes):
    """Lines of our own, none of datatrove's; an error in a task is one line."""
    write_jsonl(tmp_path / "a.jsonl", TALES)
    fields = {"dataset_name": f"jsonl:{tmp_path}/*.jsonl", "eval_dataset_name": "mukashi", "vocab_size": 800,
              "cleaning_rules": "length,minhash", "prepare_processes": processes}  # fmt: skip
    (tmp_path / "b.jsonl").write_text("{")
    failed = run(command("prepare_data", tmp_path / "w", **fields))
    assert one_line_error(failed).startswith("error: ")
    assert "b.jsonl, line 1: not a JSON object" in one_line_error(failed)
    assert len(failed.stderr.splitlines()) < 10
    (tmp_path / "b.jsonl").unlink()
    done = run(command("prepare_data", tmp_path / "w", **fields))
    assert done.returncode == 0, done.stderr
    assert "datatrove" not in done.stderr
    assert "length removed" in done.stderr


def test_more_tasks_than_files_may_be_open(corpus, tmp_path, monkeypatch):
    """Said before the first stage, not after it."""
    monkeypatch.setattr(cleaning, "allow_open_files", lambda: 256)
    with pytest.raises(UserError, match=r"--tasks=300: minhash opens a file of each task at once, .* 156 open here"):
        clean(corpus, "length,minhash", tmp_path, tasks=300)


CLEAN = """
import sys
from etils import epath
from transformer_lm.data import cleaning, corpora
from transformer_lm.data.dataset_preprocessor import Preprocessing
documents = corpora.open_documents(f"jsonl:{sys.argv[1]}", "train")
rules = ("language", "repetition", "minhash")
cleaning.clean(documents, Preprocessing(), rules, epath.Path(sys.argv[2]), cleaning.Launcher("local", tasks=2))
"""


def test_in_a_locale_that_is_not_utf_8(corpus, tmp_path):
    """Latin-1 can decode anything, and would garble all of it."""
    corpus_file = tmp_path / "a.jsonl"
    write_jsonl(corpus_file, TALES + TALES[:3] + [text for dirt in DIRT.values() for text in dirt])
    environment = os.environ | {
        "LC_ALL": "en_US",
        "LOCPATH": str(tmp_path),
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    if not shutil.which("localedef"):
        pytest.skip("no localedef on this machine to make a locale with")
    subprocess.run(["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(tmp_path / "en_US")], check=True)
    command = [sys.executable, "-c", CLEAN, str(corpus_file), str(tmp_path / "w")]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    kept = list(corpora.open_documents(f"jsonl:{tmp_path}/w/texts-*/*.jsonl.gz", "train"))
    assert set(TALES) <= set(kept)
    assert len(kept) == len(set(kept))
