"""Datasets of the hub, from a cache and from folders, as they lie without a network."""

import os
import pickle
import subprocess
import sys

import pytest
from real_datasets import make_hub_cache, parquet

from transformer_lm.data import corpora
from transformer_lm.data.corpora import huggingface
from transformer_lm.errors import UserError

pytest.importorskip("datasets")

LINES = [f"これは{i}行目です。\n" if i % 5 else "\n" for i in range(60)]
FINEWEB = """---
configs:
- config_name: jpn_Jpan
  data_files:
  - {split: train, path: data/jpn_Jpan/train/*}
  - {split: test, path: data/jpn_Jpan/test/*}
- config_name: kor_Hang
  data_files:
  - {split: train, path: data/kor_Hang/train/*}
---
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """HF_HOME with cc100's mirror and a repository of several configurations."""
    home = tmp_path_factory.mktemp("hf")
    files = {f"data/train-0000{i}-of-00003.parquet": parquet(LINES[20 * i : 20 * (i + 1)]) for i in range(3)}
    make_hub_cache(home, "range3/cc100-ja", files | {"README.md": b""})
    files = {
        "README.md": FINEWEB.encode(),
        "data/jpn_Jpan/train/000.parquet": parquet(["日本語の文書一", "日本語の文書二"]),
        "data/jpn_Jpan/test/000.parquet": parquet(["試験の文書"]),
        "data/kor_Hang/train/000.parquet": parquet(["한국어"]),
    }
    make_hub_cache(home, "HuggingFaceFW/fineweb-2", files)
    return home


def read(home, name, split="train", streaming=False, field="text"):
    """Documents read in a process of its own, since `datasets` looks at the environment when it is imported."""
    code = (
        "import sys, json\n"
        "from transformer_lm import errors\n"
        "from transformer_lm.data import corpora\n"
        "try:\n"
        "    options = corpora.Options(sys.argv[4], sys.argv[3] == 'True')\n"
        "    documents = corpora.open_documents(sys.argv[1], sys.argv[2], options)\n"
        "    print(json.dumps([list(documents), list(documents.read(0, 2)), list(documents.read(1, 2)),\n"
        "                      documents.source.fingerprint]))\n"
        "except errors.UserError as error:\n"
        "    print(json.dumps(str(error)))\n"
    )
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, name, split, str(streaming), field]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout, done.stderr
    import json

    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("streaming", [False, True])
def test_the_originals_name_of_cc100(home, streaming):
    everything, *shares, fingerprint = read(home, "huggingface:cc100/lang=ja", "train", streaming)
    assert everything == LINES
    assert sorted(shares[0] + shares[1]) == sorted(LINES)
    assert fingerprint


def test_sub_splits(home):
    assert read(home, "huggingface:cc100/lang=ja", "train[:98%]")[0] == LINES[:59]
    assert read(home, "huggingface:cc100/lang=ja", "train[98%:]")[0] == LINES[59:]
    assert read(home, "huggingface:cc100/lang=ja", "train[98%:]", streaming=True)[0] == LINES[59:]
    assert read(home, "huggingface:range3/cc100-ja", "train[10:12]+train[-1:]")[0] == [LINES[10], LINES[11], LINES[59]]


def test_configurations_and_splits(home):
    name = "huggingface:HuggingFaceFW/fineweb-2/jpn_Jpan"
    assert read(home, name)[0] == ["日本語の文書一", "日本語の文書二"]
    assert read(home, name, "test")[0] == ["試験の文書"]
    assert read(home, f"{name}:test", "train")[0] == ["試験の文書"]
    assert read(home, name, field="id")[0] == ["0", "1"]
    assert "no split 'validation'; it has train, test" in read(home, name, "validation")
    assert "no column 'texts'; it has" in read(home, name, field="texts")
    assert "cannot be opened" in read(home, "huggingface:HuggingFaceFW/fineweb-2/xxx_Xxxx")
    assert "HF_HUB_OFFLINE" in read(home, "huggingface:nobody/nothing")


def test_folders(home, tmp_path):
    [snapshot] = (home / "hub" / "datasets--range3--cc100-ja" / "snapshots").iterdir()
    documents = corpora.open_documents(f"huggingface:{snapshot}", "train")
    assert list(documents) == LINES
    assert list(pickle.loads(pickle.dumps(documents))) == LINES


def test_columns_that_differ(home, tmp_path):
    """The file is named that has others than the first one."""
    (tmp_path / "a.csv").write_text("text\n昔々\n昔\n")
    (tmp_path / "b.csv").write_text("text,url\n昔々,x\n昔,y\n")
    message = read(home, f"huggingface:{tmp_path}")
    assert f"{tmp_path}/b.csv" in message
    assert "1 new columns ({'url'})" in message


@pytest.mark.parametrize("address", ["cc100", "a//b", "", ":train"])
def test_impossible_names(address):
    with pytest.raises(UserError, match="must be"):
        corpora.open_source(f"huggingface:{address}")


def test_addresses():
    parse = huggingface.parse_address
    assert parse("wikimedia/wikipedia/20231101.ja") == ("wikimedia/wikipedia", "20231101.ja", None)
    assert parse("owner/name:test") == ("owner/name", None, "test")
    assert parse("cc100/lang=ja") == ("range3/cc100-ja", None, None)
