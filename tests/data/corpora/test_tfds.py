"""Datasets that TFDS prepared are read as TFDS reads them, without TensorFlow."""

import pickle
import subprocess
import sys

import pytest
from real_datasets import make_tfds, wiki40b_document

from transformer_lm.data import corpora
from transformer_lm.errors import UserError

tfds = pytest.importorskip("tensorflow_datasets")

ARTICLES = {
    "train": [
        wiki40b_document(f"記事{i}", f"これは{i}番目の記事の段落です。", "短い") for i in range(100)
    ],  # TFDS 4.9 loses examples of Parquet beyond
    "validation": [wiki40b_document(f"検証{i}", f"検証の{i}番目です。") for i in range(7)],
    "test": [wiki40b_document("試験", "最後の記事です。")],
}
SUB_SPLITS = [
    "train",
    "train[:98%]",
    "train[98%:]",
    "train[10%:20%]",
    "train[5:9]",
    "train[-3:]",
    "test+validation[:2]",
]


@pytest.fixture(scope="module", params=["array_record", "parquet", "tfrecord"])
def data_dir(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make_tfds(folder, "wiki40b/ja", ARTICLES, request.param)
    return request.param, folder


@pytest.fixture(scope="module")
def array_records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    make_tfds(folder, "wiki40b/ja", ARTICLES)
    return folder


@pytest.mark.parametrize("split", SUB_SPLITS)
def test_documents_are_those_of_tfds(data_dir, array_records, split, monkeypatch):
    """Against TFDS's own reader, in its order; of formats that it slices without TensorFlow: ArrayRecord."""
    _, folder = data_dir
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    source = tfds.builder("wiki40b/ja", data_dir=array_records).as_data_source(split)
    expected = [example["text"].decode() for example in source]
    found = list(corpora.open_documents("wiki40b/ja", split))
    assert found == expected
    assert len(found) > 0


def test_versions_configs_and_features(data_dir, monkeypatch):
    _, folder = data_dir
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    assert len(list(corpora.open_documents("wiki40b/ja:1.3.0", "validation"))) == 7
    ids = corpora.open_documents("wiki40b/ja", "validation", corpora.Options(text_field="wikidata_id"))
    assert sorted(ids) == [f"Q{i}" for i in range(7)]
    for name in ("wiki40b/en", "wiki40b/ja:2.0.0", "lm1b"):
        with pytest.raises(UserError, match=r"no prepared data in TFDS_DATA_DIR=.* own: pip install .* tfds build"):
            corpora.open_documents(name, "train")
    with pytest.raises(UserError, match="no split 'dev'; it has train, validation, test"):
        corpora.open_documents("wiki40b/ja", "dev")
    with pytest.raises(UserError, match="no feature 'texts'; it has"):
        corpora.open_documents("wiki40b/ja", "train", corpora.Options(text_field="texts"))


def test_may_be_sent_to_another_process(data_dir, monkeypatch):
    _, folder = data_dir
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    documents = corpora.open_documents("wiki40b/ja", "train[50%:]")
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert list(pickle.loads(pickle.dumps(documents))) == list(documents)


def test_damaged_files(data_dir, monkeypatch, tmp_path):
    kind, folder = data_dir
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.rglob("*"):
        target = copy / path.relative_to(folder)
        target.mkdir() if path.is_dir() else target.write_bytes(path.read_bytes())
    [path] = (copy / "wiki40b" / "ja" / "1.3.0").glob(f"wiki40b-train.{kind}-*")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    monkeypatch.setenv("TFDS_DATA_DIR", str(copy))
    with pytest.raises(UserError, match="train"):
        list(corpora.open_documents("wiki40b/ja", "train"))


def test_no_tensorflow(data_dir):
    """In a process of its own, with the features of lm1b."""
    kind, folder = data_dir
    make_tfds(folder, "lm1b", {"train": ["The first .", "The second ."], "test": ["The third ."]}, kind)
    code = (
        "import sys\n"
        "from transformer_lm.data import corpora\n"
        "print(sorted(corpora.open_documents('lm1b', 'train')), 'tensorflow' in sys.modules)"
    )
    environment = {"TFDS_DATA_DIR": str(folder), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "['The first .', 'The second .'] False", done.stderr


@pytest.mark.parametrize(
    ("place", "words"),
    [(0, "does not agree with its checksum"), (20, "does not agree with its checksum"), (-1, "does not agree"),
     (None, "ends inside a record")],
)  # fmt: skip
def test_damaged_tf_records(tmp_path, monkeypatch, place, words):
    """A length, a record's bytes or their checksum are not what they were; or the file's end is missing."""
    make_tfds(tmp_path, "lm1b", {"train": ["The first .", "The second ."], "test": ["The third ."]}, "tfrecord")
    [path] = tmp_path.rglob("*train.tfrecord*")
    content = bytearray(path.read_bytes())
    if place is None:
        del content[-6:]
    else:
        content[place] ^= 1
    path.write_bytes(content)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match=words):
        list(corpora.open_documents("lm1b", "train"))


def test_classes_of_somebodys_own_are_not_imported(data_dir, monkeypatch, tmp_path):
    """TFDS imports what features.json names; a file in the current folder would do."""
    kind, _ = data_dir
    make_tfds(tmp_path, "lm1b", {"train": ["The first ."], "test": ["The third ."]}, kind)
    [path] = tmp_path.rglob("features.json")
    path.write_text(path.read_text().replace("tensorflow_datasets.core.features.text_feature.Text", "evil.Text"))
    assert "evil" in path.read_text()
    (tmp_path / "evil.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"features\.json names the class 'evil\.Text', which is none of TFDS's own"):
        corpora.open_documents("lm1b", "train")
