"""Which files a path or pattern names: all that people and file systems allow, and nothing left out in silence."""

import os
import socket

import fsspec
import pytest

from transformer_lm.data import corpora
from transformer_lm.data.corpora import listing
from transformer_lm.errors import UserError

# What a file system allows, and patterns, URLs, flags and encodings stumble over; the last is 「テ」 in Shift_JIS.
NAMES = ["a[1]", "[ab]", "{a,b}", "a?", "a*", "**", " a b ", "100%", "a%20b", "#1", "a\\b", "a\nb", "a'b\"c", "a::b",
         "a:b", "~", "-a", "日本語 が", os.fsdecode("テ".encode("shift_jis"))]  # fmt: skip


def write(path, text):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def read(pattern, kind="text"):
    return list(corpora.open_documents(f"{kind}:{pattern}", "train"))


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_name(tmp_path, name, monkeypatch):
    """As a file beside others that the name would match as a pattern, as a folder's, and from within."""
    folder = f"{tmp_path}/{name}"
    for other in ("a1", "a", "ab", "b", "a b"):
        write(f"{tmp_path}/{other}/x.txt", "other")
        write(f"{folder}/{other}.txt", "other")
    write(f"{folder}/{name}.txt", "this")
    write(f"{folder}/deep/er/{name}.md", "deep")
    assert read(f"{folder}/{name}.txt") == ["this"]
    assert read(f"file://{folder}/{name}.txt") == ["this"]
    assert read(f"{folder}/**/*.md") == ["deep"]
    if name != "**":
        assert sorted(read(f"{folder}/*.txt")) == ["other"] * 5 + ["this"]
    monkeypatch.chdir(folder)
    if name != "~":
        assert read(f"{name}.txt") == ["this"]
    assert read(f"./{name}.txt") == ["this"]
    source = corpora.open_source(f"text:./{name}.txt")
    assert len(source.fingerprint) == 64


@pytest.mark.parametrize("name", ["b?", "b*", "?", "b?[1]*"])
def test_folders_named_like_patterns_are_meant_themselves(tmp_path, name):
    """In the middle of a path, too; elsewhere, and where such a name is a file's, it is a pattern."""
    for folder in (name, "b", "bX1"):
        write(f"{tmp_path}/1/{folder}/in/x.txt", folder)
    assert read(f"{tmp_path}/1/{name}/**/*.txt") == read(f"{tmp_path}/*/{name}/in/x.txt") == [name]
    write(f"{tmp_path}/2/{name}", "a file")
    write(f"{tmp_path}/2/bc/x.txt", "c")
    assert read(f"{tmp_path}/2/b?/*.txt") == read(f"{tmp_path}/2/*/*.txt") == ["c"]
    write(f"{tmp_path}/3/*.txt", "star")
    write(f"{tmp_path}/3/a.txt", "a")
    assert read(f"{tmp_path}/[3]/*.txt") == ["star", "a"]


def test_patterns(tmp_path):
    """As a shell expands them, but that hidden files count."""
    names = ["a.txt", "b.txt", "c.md", "d/a.txt", "d/e/a.txt", "d/e/f/b.txt", ".h.txt", "a1.txt", "z[1].txt"]
    for name in names:
        write(f"{tmp_path}/{name}", name)

    def found(pattern):
        return [os.path.relpath(info["name"], tmp_path) for info in listing.list_files(f"{tmp_path}/{pattern}")[1]]

    assert found("*.txt") == [".h.txt", "a.txt", "a1.txt", "b.txt", "z[1].txt"]
    assert found("?.txt") == ["a.txt", "b.txt"]
    assert found("[!a].*") == ["b.txt", "c.md"]
    assert found("a[0-9].txt") == ["a1.txt"]
    assert found("z[[]1].txt") == ["z[1].txt"]
    assert found("**/a.txt") == ["a.txt", "d/a.txt", "d/e/a.txt"]
    assert found("d/**") == ["d/a.txt", "d/e/a.txt", "d/e/f/b.txt"]
    assert found("d/*/**/*.txt") == ["d/e/a.txt", "d/e/f/b.txt"]
    assert found("**/**/b.txt") == ["b.txt", "d/e/f/b.txt"]
    assert found("x/*") == found("*/x/*") == []
    with pytest.raises(UserError, match="is a folder; name the files in it"):
        found("d")


def test_links_are_followed(tmp_path):
    write(f"{tmp_path}/real/a.txt", "a")
    write(f"{tmp_path}/real/b.txt", "b")
    write(f"{tmp_path}/corpus/c.txt", "c")
    (tmp_path / "corpus" / "b.txt").symlink_to("../real/b.txt")
    (tmp_path / "corpus" / "sub").symlink_to(tmp_path / "real")
    (tmp_path / "whole").symlink_to("corpus")
    assert read(f"{tmp_path}/corpus/*.txt") == ["b", "c"]
    assert read(f"{tmp_path}/corpus/*/*.txt") == ["a", "b"]
    assert read(f"{tmp_path}/corpus/**/*.txt") == read(f"{tmp_path}/whole/**/*.txt") == ["b", "c", "a", "b"]
    assert read(f"{tmp_path}/corpus/b.txt") == ["b"]


def test_what_a_link_leads_to_is_fingerprinted(tmp_path):
    write(f"{tmp_path}/real.txt", "before")
    (tmp_path / "link.txt").symlink_to("real.txt")
    before = corpora.open_source(f"text:{tmp_path}/link.txt").fingerprint
    assert corpora.open_source(f"text:{tmp_path}/lin*.txt").fingerprint == before
    os.utime(tmp_path / "real.txt", (1, 1))
    assert corpora.open_source(f"text:{tmp_path}/link.txt").fingerprint != before
    before = corpora.open_source(f"text:{tmp_path}/link.txt").fingerprint
    write(f"{tmp_path}/real.txt", "afterwards")
    os.utime(tmp_path / "real.txt", (1, 1))
    assert corpora.open_source(f"text:{tmp_path}/link.txt").fingerprint != before


@pytest.mark.parametrize("pattern", ["b.txt", "*.txt", "**/*.txt", "**"])
@pytest.mark.parametrize("target", ["gone.txt", "b.txt", "a.txt/x"])
def test_broken_links_are_named(tmp_path, pattern, target):
    """One that leads nowhere, to itself, or through a file."""
    write(f"{tmp_path}/a.txt", "a")
    (tmp_path / "b.txt").symlink_to(target)
    with pytest.raises(UserError, match=rf"b\.txt is a link to {target}, which is not there"):
        read(f"{tmp_path}/{pattern}")


@pytest.mark.parametrize("pattern", ["*/*.txt", "**/*.txt"])
def test_broken_links_to_folders_are_named(tmp_path, pattern, caplog):
    write(f"{tmp_path}/d/a.txt", "a")
    (tmp_path / "e").symlink_to("gone")
    with caplog.at_level("WARNING", logger="absl"):
        assert read(f"{tmp_path}/{pattern}") == ["a"]
    assert f"{tmp_path}/e is a link to nowhere" in caplog.text


def test_loops_end(tmp_path, caplog):
    """A folder that links to itself, to its parent, and two that link to each other: every document once a way."""
    write(f"{tmp_path}/d/a.txt", "a")
    write(f"{tmp_path}/d/e/b.txt", "b")
    (tmp_path / "d" / "self").symlink_to(".")
    (tmp_path / "d" / "e" / "up").symlink_to("..")
    with caplog.at_level("WARNING", logger="absl"):
        assert read(f"{tmp_path}/d/**/*.txt") == ["a", "b"]
    assert "d/self leads to a folder that has been read" in caplog.text
    write(f"{tmp_path}/x/c.txt", "c")
    write(f"{tmp_path}/y/d.txt", "d")
    (tmp_path / "x" / "y").symlink_to("../y")
    (tmp_path / "y" / "x").symlink_to("../x")
    assert read(f"{tmp_path}/x/**/*.txt") == ["c", "d"]


def test_folders_that_all_link_to_each_other(tmp_path):
    """There are a million ways through ten of them, and ten documents."""
    for here in range(10):
        write(f"{tmp_path}/{here}/x/{here}.txt", str(here))
        for there in {*range(10)} - {here}:
            (tmp_path / str(here) / f"to{there}").symlink_to(f"../{there}")
    expected = sorted(map(str, range(10)))
    assert sorted(read(f"{tmp_path}/**/*.txt")) == expected
    assert sorted(read(f"{tmp_path}/**/x/**/*.txt")) == expected


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"a\.txt is a pipe, socket or device"):
        read(f"{tmp_path}/*.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{tmp_path}/b.md")
        with pytest.raises(UserError, match=r"b\.md is a pipe, socket or device"):
            read(f"{tmp_path}/*.md")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_folders_that_may_not_be_read(tmp_path):
    write(f"{tmp_path}/d/a.txt", "a")
    (tmp_path / "d").chmod(0)
    try:
        with pytest.raises(UserError, match=r"cannot be listed.*Permission denied.*/d"):
            read(f"{tmp_path}/**/*.txt")
    finally:
        (tmp_path / "d").chmod(0o700)


def test_folders_that_cannot_be_listed(tmp_path, monkeypatch):
    """As after a fault of the disk or the network."""
    write(f"{tmp_path}/d/a.txt", "a")
    list_folder = os.listdir

    def fail(folder):
        if str(folder).endswith("/d"):
            raise OSError(5, "Input/output error", folder)
        return list_folder(folder)

    monkeypatch.setattr(os, "listdir", fail)
    with pytest.raises(UserError, match=r"cannot be listed: OSError: .*Input/output error.*/d"):
        read(f"{tmp_path}/**/*.txt")


def test_remote_names(tmp_path):
    """A full name is that object, a pattern is a pattern; what is neither file nor folder is kept."""
    memory = fsspec.filesystem("memory")
    memory.pipe({"/names/a[1].txt": b"this", "/names/a1.txt": b"other", "/names/b/c.txt": b"deep"})
    assert read("memory://names/a[1].txt") == ["this"]
    assert read("memory://names/a[0-9].txt") == ["other"]
    assert read("memory://names/**") == ["other", "this", "deep"]
