"""Documents from files."""

import gzip
import json

import pytest

from transformer_lm import corpora
from transformer_lm.errors import UserError

POEMS = ["菜の花や\n月は東に\n日は西に", "春の海\nひねもすのたり\nのたりかな", "朝顔に\nつるべ取られて\nもらい水"]


def read(name, split="train"):
    return list(corpora.open_documents(name, split))


@pytest.mark.parametrize("compressed", [False, True])
def test_text_is_separated_by_blank_lines(tmp_path, compressed):
    name = "poems.txt.gz" if compressed else "poems.txt"
    content = ("\n" + "\n\n".join(POEMS[:2]) + "\n \n\n" + POEMS[2] + "\n").encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if compressed else content)
    assert read(f"text:{tmp_path / name}") == POEMS


def test_one_document_a_file(tmp_path):
    for number, poem in enumerate(POEMS):
        (tmp_path / f"{number}.txt").write_text(poem, encoding="utf-8")
    assert read(f"text:{tmp_path}/*.txt") == POEMS


@pytest.mark.parametrize("compressed", [False, True])
def test_jsonl(tmp_path, compressed):
    content = "".join(json.dumps({"title": "句", "text": poem}, ensure_ascii=False) + "\n" for poem in POEMS)
    name = "poems.jsonl.gz" if compressed else "poems.jsonl"
    (tmp_path / name).write_bytes(gzip.compress(content.encode()) if compressed else content.encode())
    assert read(f"jsonl:{tmp_path / name}") == POEMS


def test_nested_folders_in_the_order_of_names(tmp_path):
    for number, folder in enumerate(["b", "a/x", "c"]):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "poem.txt").write_text(POEMS[number], encoding="utf-8")
    assert read(f"text:{tmp_path}/**/*.txt") == [POEMS[1], POEMS[0], POEMS[2]]


def test_sub_splits(tmp_path):
    (tmp_path / "numbers.jsonl").write_text("".join(json.dumps({"text": str(n)}) + "\n" for n in range(50)))
    name = f"jsonl:{tmp_path}/numbers.jsonl"
    assert read(name, "train[:98%]") == [str(n) for n in range(49)]
    assert read(name, "train[98%:]") == ["49"]
    assert read(name, "train[10:12]+train[-1:]") == ["10", "11", "49"]


def test_may_be_read_again(tmp_path):
    (tmp_path / "poems.txt").write_text("\n\n".join(POEMS), encoding="utf-8")
    documents = corpora.open_documents(f"text:{tmp_path}/poems.txt", "train")
    assert list(documents) == list(documents) == POEMS


def test_fingerprint_follows_the_content(tmp_path):
    path = tmp_path / "poems.txt"
    path.write_text(POEMS[0], encoding="utf-8")
    before = corpora.open_source(f"text:{path}").fingerprint
    assert corpora.open_source(f"text:{path}").fingerprint == before
    path.write_text(POEMS[0] + POEMS[1], encoding="utf-8")
    assert corpora.open_source(f"text:{path}").fingerprint != before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "a"}\n{"title": "b"}\n', "line 2: not a JSON object with a field 'text'"),
        (b"no json\n", "line 1: not a JSON object"),
        (b'{"text": 3}\n', "line 1: field 'text' is a int"),
        ('{"text": "日本"}'.encode("shift_jis"), "line 1: not UTF-8"),
    ],
)
def test_unreadable_content(tmp_path, content, words):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=words):
        read(f"jsonl:{tmp_path}/x.jsonl")


def test_truncated_gzip(tmp_path):
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress("\n".join(POEMS * 100).encode())[:-20])
    with pytest.raises(UserError, match=r"x.txt.gz cannot be read to its end"):
        read(f"text:{tmp_path}/x.txt.gz")


@pytest.mark.parametrize(
    ("name", "split", "words"),
    [
        ("text:/no/such/*.txt", "train", "No file matches '/no/such/"),
        ("text:/no/such.txt.gz", "train", "No file matches"),
        ("csv:/no/such.csv", "train", "must be a name of TensorFlow Datasets"),
        ("mukashi", "test", "no split 'test'; it has train, validation"),
        ("mukashi", "train[:", "cannot be read"),
    ],
)
def test_what_does_not_exist(name, split, words):
    with pytest.raises(UserError, match=words):
        corpora.open_documents(name, split)
