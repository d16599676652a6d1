"""Files whose content is not what their name says, and content that no document can be."""

import bz2
import gzip
import io
import json
import lzma
import struct
import tarfile
import zipfile

import pytest

from transformer_lm.data import corpora
from transformer_lm.data.corpora import base, content, files
from transformer_lm.errors import UserError

LINES = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in ("春の海", "朝顔に")).encode()
POEMS = "春の海\n\n朝顔に\n".encode()
COMPRESS = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": content.zstd.compress}


def tar(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("a.txt")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zipped(data: bytes, method=zipfile.ZIP_STORED, names=("a.txt",)) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name in names:
            archive.writestr(name, data)
    return buffer.getvalue()


def read(path, data: bytes, kind="jsonl", field="text"):
    path.write_bytes(data)
    return list(corpora.open_documents(f"{kind}:{path}", "train", corpora.Options(field)))


def error(path, data, **options) -> str:
    with pytest.raises(UserError) as caught:
        read(path, data, **options)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("kind", ["text", "jsonl"])
@pytest.mark.parametrize("named", [*COMPRESS, ".jsonl", ".GZ", ""])
@pytest.mark.parametrize("ending", list(COMPRESS))
def test_compressed_content_decides_and_not_the_name(tmp_path, kind, named, ending):
    data = COMPRESS[ending](LINES if kind == "jsonl" else POEMS)
    assert read(tmp_path / f"x{named}", data, kind=kind) == ["春の海", "朝顔に"]


@pytest.mark.parametrize("ending", list(COMPRESS))
@pytest.mark.parametrize(
    "data", [LINES, b"", b"<html>404</html>", zipped(LINES)], ids=["plain", "empty", "html", "zip"]
)
def test_names_of_compression_without_it(tmp_path, ending, data):
    assert "does not hold what its ending says" in error(tmp_path / f"x{ending}", data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (tar(LINES), "a tar archive"),
        (zipped(LINES), "a zip archive"),
        (zipped(LINES, zipfile.ZIP_DEFLATED), "a zip archive"),
        (zipped(b"", names=()), "a zip archive"),
        (b"%PDF-1.4\n", "a PDF"),
        ("春の海".encode("utf-16"), "UTF-16"),
        ("春の海".encode("utf-32"), "UTF-16"),
        ("haru no umi".encode("utf-16-le"), "a binary file"),
        (bytes(100_000), "a binary file"),
        (struct.pack("<100I", *range(100)), "a binary file"),
    ],
    ids=["tar", "zip", "deflated", "empty-zip", "pdf", "utf-16", "utf-32", "utf-16-no-bom", "zeros", "integers"],
)
@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_binary_content_becomes_no_documents(tmp_path, data, words, kind):
    assert f"holds {words}" in error(tmp_path / "x.txt", data, kind=kind).replace("text in ", "")
    assert f"holds {words}" in error(tmp_path / "x.txt.gz", gzip.compress(data), kind=kind).replace("text in ", "")


def test_compressed_twice(tmp_path):
    assert "a compressed .xz file in a compressed .gz file" in error(
        tmp_path / "x.gz", gzip.compress(lzma.compress(LINES))
    )


@pytest.mark.parametrize("ending", list(COMPRESS))
def test_damaged_in_the_middle(tmp_path, ending):
    data = bytearray(COMPRESS[ending](b"".join(json.dumps({"text": f"{n * n}"}).encode() + b"\n" for n in range(9999))))
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    assert "x" + ending in error(tmp_path / f"x{ending}", bytes(data))


def test_documents_without_end(tmp_path, monkeypatch):
    """A small file that a single line of it would fill the memory with."""
    monkeypatch.setattr(base, "MAX_DOCUMENT_BYTES", 1 << 20)
    monkeypatch.setattr(files, "MAX_ARRAY_BYTES", 5 << 20)
    bomb = gzip.compress(b"a" * (3 << 20))
    for kind in ("text", "jsonl"):
        assert "a document of more than 1 MB" in error(tmp_path / "x.gz", bomb, kind=kind)
    lines = gzip.compress(b"a line\n" * (1 << 18))
    assert "a document of more than 1 MB" in error(tmp_path / "x.gz", lines, kind="text")
    array = gzip.compress(json.dumps([{"text": "a" * (2 << 20)}]).encode())
    assert "a document of more than 1 MB" in error(tmp_path / "x.gz", array)
    array = gzip.compress(json.dumps([{"text": "a" * (1 << 19)}] * 11).encode())
    assert "is a JSON array of more than 5 MB; make it JSON lines" in error(tmp_path / "x.gz", array)


NESTED = '{"text": "a", "more": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    "line",
    [NESTED, NESTED.replace("[", '{"a":').replace("]", "}").replace(":}", ":1}"), "1" * 5000, '{"text": NaN}', "[]",
     '"text"', "null", "true", "{}",
     '{"text": 1e999}', '{"text": ["a"]}', '{"text": "a"', '{"text": "\\ud83"}', "{'text': 'a'}",
     '{"text": "a"} {"text": "b"}', '{"text": ' + "9" * 5000 + "}", '{"text": "\x01"}'],
    ids=lambda line: line[:24],
)  # fmt: skip
def test_lines_that_are_no_records(tmp_path, line):
    """The line is named, whatever Python's reader of JSON raises."""
    path = tmp_path / "x.jsonl"
    message = error(path, b'{"text": "a"}\n\n' + line.encode() + b"\n")
    assert message.startswith(f"{path}, line 3: ")
    assert len(message) < 600


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"text": "\\ud83d\\ude00 \\ud83d"}', ["\U0001f600 \ud83d"]),
        (b'{"text": "a", "text": "b"}', ["b"]),
        (b'{"text": null}\n{"text": ""}', ["", ""]),
        (b'\xef\xbb\xbf{"text": "a"}\r\n\r\n\xef\xbb\xbf{"text": "b"}\r\n', ["a", "b"]),
        (b'[{"text": "a"}, {"text": null, "n": NaN}]', ["a", ""]),
        (b'\xef\xbb\xbf[\r\n  {\r\n    "text": "a"\r\n  }\r\n]\r\n', ["a"]),
        (b'{"text": "a", "n": [1e999, -0, NaN, Infinity], "big": 123456789012345678901234567890}', ["a"]),
        ('{"text": "a\u2028b\u0085c"}'.encode(), ["a\u2028b\u0085c"]),
    ],
)
def test_lines_that_are_records(tmp_path, data, expected):
    assert read(tmp_path / "x.jsonl", data) == expected


@pytest.mark.parametrize("data", [b'[{"text": "a"}', b'[{"text": "a"}, 3]', b'[{"txt": "a"}]', b'[{"text": 3}]'])
def test_arrays_that_are_none(tmp_path, data):
    assert "x.json" in error(tmp_path / "x.json", data)


@pytest.mark.parametrize("encoding", ["shift_jis", "euc_jp", "cp1252"])
def test_other_encodings(tmp_path, encoding):
    text = "café" if encoding == "cp1252" else "日本語"
    assert "line 1: not UTF-8" in error(tmp_path / "x.txt", text.encode(encoding), kind="text")


@pytest.mark.parametrize("kind", ["text", "jsonl"])
@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("iso2022_jp", "日本語"),
        ("iso2022_jp_1", "丂"),
        ("iso2022_jp_2004", "俱"),
        ("iso2022_jp_ext", "ｱｲｳ"),
        ("iso2022_jp", "¥100"),
    ],
)
def test_encodings_in_bytes_of_ascii(tmp_path, kind, encoding, text):
    """Also after much that is ASCII, as where files were joined; other escape sequences are those of a terminal."""
    data = b'"plain"\n' * 20_000 if kind == "text" else LINES * 2000
    last = data.count(b"\n") + 1
    if kind == "jsonl":
        text = f'{{"text": "{text}"}}'
    message = error(tmp_path / "x.txt", data + text.encode(encoding), kind=kind)
    assert f"line {last}: ISO-2022-JP, not UTF-8; convert the file, for example with iconv -f ISO-2022-JP" in message


def test_colours_of_a_terminal_are_text(tmp_path):
    text = "\x1b[31m昔々\x1b(B\x1b[m $B"
    assert read(tmp_path / "x.txt", text.encode(), kind="text") == [text]
