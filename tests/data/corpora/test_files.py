"""Documents from files."""

import bz2
import functools
import gzip
import http.server
import json
import lzma
import threading

import pytest

from transformer_lm.data import corpora
from transformer_lm.data.corpora import content
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
        (b'{"text": 3}\n', "line 1: 'text' is a int, not a string"),
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


COMPRESSORS = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": content.zstd.compress}


@pytest.mark.parametrize("ending", list(COMPRESSORS))
def test_compressed_and_truncated(tmp_path, ending):
    """As cc100's ja.txt.xz: documents separated by blank lines. A cut file is an error, never a shorter corpus."""
    content = COMPRESSORS[ending]("\n\n".join(POEMS * 50).encode())
    path = tmp_path / f"ja.txt{ending}"
    path.write_bytes(content)
    assert read(f"text:{path}") == POEMS * 50
    path.write_bytes(content[:-10])
    with pytest.raises(UserError, match="cannot be read to its end"):
        read(f"text:{path}")


def test_several_compressed_parts_in_one_file(tmp_path):
    for ending, compress in COMPRESSORS.items():
        (tmp_path / f"x.txt{ending}").write_bytes(compress(b"one\n\n") + compress(b"two\n"))
        assert read(f"text:{tmp_path}/x.txt{ending}") == ["one", "two"], ending


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    for i, compression in enumerate(["snappy", "zstd"]):
        table = pa.table({"title": ["句"] * 3, "text": [f"{poem}{i}" for poem in POEMS], "n": [1, 2, 3]})
        pyarrow.parquet.write_table(table, tmp_path / f"{i}.parquet", compression=compression, row_group_size=2)
    name = f"parquet:{tmp_path}/*.parquet"
    assert read(name) == [f"{poem}{i}" for i in range(2) for poem in POEMS]
    assert read(name, "train[2:4]") == [f"{POEMS[2]}0", f"{POEMS[0]}1"]
    assert list(corpora.open_documents(name, "train", corpora.Options("title"))) == ["句"] * 6
    for field, words in (("body", "no column 'body'; it has title, text, n"), ("n", "'n' is a int, not a string")):
        with pytest.raises(UserError, match=words):
            list(corpora.open_documents(name, "train", corpora.Options(field)))
    (tmp_path / "0.parquet").write_bytes((tmp_path / "0.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        read(name)


def test_other_fields(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"body": "本文"}\n', encoding="utf-8")
    assert list(corpora.open_documents(f"jsonl:{tmp_path}/x.jsonl", "train", corpora.Options("body"))) == ["本文"]


def test_byte_order_marks_and_windows_line_ends(tmp_path):
    (tmp_path / "x.txt").write_bytes("\ufeff一\r\n二\r\n\r\n三\r\n".encode())
    assert read(f"text:{tmp_path}/x.txt") == ["一\r\n二", "三"]


def test_remote_files():
    """Any of fsspec's file systems; here the one in memory."""
    import fsspec

    memory = fsspec.filesystem("memory")
    for i, poem in enumerate(POEMS):
        memory.pipe(f"/corpus/{i}.txt.gz", gzip.compress(poem.encode()))
    documents = corpora.open_documents("text:memory://corpus/*.txt.gz", "train[1:]")
    assert list(documents) == POEMS[1:]
    before = documents.source.fingerprint
    memory.pipe("/corpus/0.txt.gz", gzip.compress(b"changed"))
    assert corpora.open_source("text:memory://corpus/*.txt.gz").fingerprint != before


def test_over_http(tmp_path):
    """A published file like cc100's ja.txt.xz, by its address."""
    pytest.importorskip("aiohttp")
    (tmp_path / "ja.txt.xz").write_bytes(lzma.compress("\n\n".join(POEMS).encode()))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert read(f"text:http://127.0.0.1:{server.server_port}/ja.txt.xz") == POEMS
        with pytest.raises(UserError, match="No file matches"):
            read(f"text:http://127.0.0.1:{server.server_port}/ko.txt.xz")
        server.shutdown()


def test_missing_packages_are_named():
    """As of an fsspec protocol that nothing is installed for, and one that does not exist."""
    with pytest.raises(UserError, match=r"-e '\.\[s3\]'|cannot be listed|No file matches"):
        corpora.open_source("text:s3://bucket/x.txt")
    with pytest.raises(UserError, match="nosuch"):
        corpora.open_source("text:nosuch://bucket/x.txt")


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 7, 20])
@pytest.mark.parametrize(
    "split", ["train", "train[:70%]", "train[13:31]", "train[4:]", "train[-9:]", "train[:5]+train[30:]"]
)
def test_tasks_share_the_documents(tmp_path, num_tasks, split):
    """Every document is read by one task, whatever their number, counted before or not."""
    for i, size in enumerate([3, 0, 17, 1, 9, 12]):
        (tmp_path / f"{i}.txt").write_text("\n\n".join(f"{i}-{n}" for n in range(size)))
    name = f"text:{tmp_path}/*.txt"
    expected = read(name, split)
    for counted in (False, True):
        documents = corpora.open_documents(name, split)
        if counted:
            documents.count()
        shares = [list(documents.read(task, num_tasks)) for task in range(num_tasks)]
        assert sorted(document for share in shares for document in share) == sorted(expected)


@pytest.mark.parametrize(("split", "read"), [("train", 0), ("train[:4]", 5), ("train[6:]", 10), ("train[3:5]", 5)])
def test_no_more_is_counted_than_tasks_need(tmp_path, split, read):
    """Of five files of five documents each: not those behind the last document, nor any of a split that is whole."""
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text("\n\n".join("昔々" for _ in range(5)))
    documents = corpora.open_documents(f"text:{tmp_path}/*.txt", split)
    documents.count()
    known = [documents.source.known_size("train", shard) for shard in range(5)]
    assert known == [5] * (read // 5) + [None] * (5 - read // 5)
    shares = [len(list(documents.read(task, 3))) for task in range(3)]
    assert sum(shares) == {"train": 25, "train[:4]": 4, "train[6:]": 19, "train[3:5]": 2}[split]


def test_rows_of_parquet_are_counted_by_the_files_own_word(tmp_path, monkeypatch):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for number, rows in enumerate([7, 0, 5]):
        texts = arrow.table({"text": arrow.array([f"{number}-{row}" for row in range(rows)], arrow.string())})
        parquet.write_table(texts, tmp_path / f"{number}.parquet")
    documents = corpora.open_documents(f"parquet:{tmp_path}/*", "train[50%:]")
    monkeypatch.setattr(documents.source, "documents", None)
    documents.count()
    assert documents.source.size("train") == 12
    monkeypatch.undo()
    assert list(documents) == ["0-6", *(f"2-{row}" for row in range(5))]
