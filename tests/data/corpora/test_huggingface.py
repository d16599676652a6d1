"""Datasets of the hub, from a cache and from folders, as they lie without a network."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from real_datasets import make_hub_cache, parquet, write_jsonl

from transformer_lm.data import corpora
from transformer_lm.data.corpora import huggingface
from transformer_lm.errors import UserError

pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")

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


def arrow(texts: list[str]) -> bytes:
    table = pyarrow.table({"text": texts})
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


READER = """
import json, sys
from transformer_lm import errors
from transformer_lm.data import corpora
for line in sys.stdin:
    name, split, field, streaming = json.loads(line)
    try:
        documents = corpora.open_documents(name, split, corpora.Options(field, streaming))
        answer = [list(documents), list(documents.read(0, 2)), list(documents.read(1, 2)), documents.source.fingerprint]
    except errors.UserError as error:
        answer = str(error)
    print("answer", json.dumps(answer), flush=True)
"""


@pytest.fixture(scope="module")
def read(home):
    """Reads documents in a process of its own, since `datasets` looks at the environment when it is imported."""
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", READER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:

        def ask(name, split="train", streaming=False, field="text"):
            print(json.dumps([name, split, field, streaming]), file=reader.stdin, flush=True)
            return json.loads(
                next(line for line in reader.stdout if line.startswith("answer ")).removeprefix("answer ")
            )

        yield ask


@pytest.mark.parametrize("streaming", [False, True])
def test_the_originals_name_of_cc100(read, streaming):
    everything, *shares, fingerprint = read("huggingface:cc100/lang=ja", "train", streaming)
    assert everything == LINES
    assert sorted(shares[0] + shares[1]) == sorted(LINES)
    assert fingerprint


def test_sub_splits(read):
    assert read("huggingface:cc100/lang=ja", "train[:98%]")[0] == LINES[:59]
    assert read("huggingface:cc100/lang=ja", "train[98%:]")[0] == LINES[59:]
    assert read("huggingface:cc100/lang=ja", "train[98%:]", streaming=True)[0] == LINES[59:]
    assert read("huggingface:range3/cc100-ja", "train[10:12]+train[-1:]")[0] == [LINES[10], LINES[11], LINES[59]]


def test_configurations_and_splits(read):
    name = "huggingface:HuggingFaceFW/fineweb-2/jpn_Jpan"
    assert read(name)[0] == ["日本語の文書一", "日本語の文書二"]
    assert read(name, "test")[0] == ["試験の文書"]
    assert read(f"{name}:test", "train")[0] == ["試験の文書"]
    assert read(name, field="id")[0] == ["0", "1"]
    assert "no split 'validation'; it has train, test" in read(name, "validation")
    assert "no column 'texts'; it has" in read(name, field="texts")
    assert "cannot be opened" in read("huggingface:HuggingFaceFW/fineweb-2/xxx_Xxxx")
    assert "HF_HUB_OFFLINE" in read("huggingface:nobody/nothing")


def test_folders(home, tmp_path):
    [snapshot] = (home / "hub" / "datasets--range3--cc100-ja" / "snapshots").iterdir()
    documents = corpora.open_documents(f"huggingface:{snapshot}", "train")
    assert list(documents) == LINES
    assert list(pickle.loads(pickle.dumps(documents))) == LINES


def test_columns_that_differ(read, tmp_path):
    """The file is named that has others than the first one."""
    (tmp_path / "a.csv").write_text("text\n昔々\n昔\n")
    (tmp_path / "b.csv").write_text("text,url\n昔々,x\n昔,y\n")
    message = read(f"huggingface:{tmp_path}")
    assert f"{tmp_path}/b.csv" in message
    assert "1 new columns ({'url'})" in message


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [("b.parquet", parquet(["昔々"])[:-20]), ("b.csv", 'text\n"昔,\n'.encode()), ("b.arrow", b"ARROW1")],
)
def test_damaged_files(read, tmp_path, name, content, streaming):
    """The file is named that cannot be read, though others can."""
    good = {"parquet": parquet(["昔"]), "csv": "text\n昔\n".encode(), "arrow": arrow(["昔"])}[name[2:]]
    (tmp_path / f"a.{name[2:]}").write_bytes(good)
    (tmp_path / name).write_bytes(content)
    message = read(f"huggingface:{tmp_path}", streaming=streaming)
    assert f"{tmp_path}/{name}" in message
    assert "\n" not in message


@pytest.mark.parametrize("address", ["cc100", "a//b", "", ":train"])
def test_impossible_names(address):
    with pytest.raises(UserError, match="must be"):
        corpora.open_source(f"huggingface:{address}")


def test_addresses():
    parse = huggingface.parse_address
    assert parse("wikimedia/wikipedia/20231101.ja") == ("wikimedia/wikipedia", "20231101.ja", None)
    assert parse("owner/name:test") == ("owner/name", None, "test")
    assert parse("cc100/lang=ja") == ("range3/cc100-ja", None, None)


@pytest.mark.parametrize(
    ("train", "evaluation", "told"),
    [
        ("{here}/tales train", "tales train[:3]", True),
        ("{here}/tales train[:3]", "link train[3:]", False),
        ("tales train", "link train", True),
        ("tales validation", "tales:validation train", True),
        ("tales train", "tales:validation train", False),
        ("tales train", "others train", False),
    ],
)
def test_evaluating_on_the_same_folder_is_noticed(tmp_path, monkeypatch, train, evaluation, told):
    """Under whatever name, and with its split in the name or not."""
    monkeypatch.chdir(tmp_path)
    for folder in ("tales", "others"):
        Path(folder).mkdir()
        for split in ("train", "validation"):
            write_jsonl(tmp_path / folder / f"{split}.jsonl", [f"{folder} {split} {number}" for number in range(5)])
    (tmp_path / "link").symlink_to("tales")
    one, other = (name.format(here=tmp_path).split() for name in (train, evaluation))
    one, other = (corpora.open_documents(f"huggingface:{name}", split) for name, split in (one, other))
    assert one.overlaps(other) == other.overlaps(one) == told
