"""Preprocessors, document by document, from the original's rules."""

import importlib
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformer_lm.data import dataset_preprocessor
from transformer_lm.data.corpora import conversations
from transformer_lm.data.dataset_preprocessor import PREPROCESSORS, Preprocessing, for_dataset
from transformer_lm.errors import UserError

ARTICLE = """
_START_ARTICLE_
ビートたけしの教科書に載らない日本人の謎
_START_SECTION_
概要
_START_PARAGRAPH_
「教科書には決して載らない」日本人の謎やしきたりを多角的に検証する番組。_NEWLINE_九文字しかない段落_NEWLINE_ちょうど十文字の文です
_START_SECTION_
新春番組
_START_PARAGRAPH_
短い
_START_PARAGRAPH_
2009年1月1日に放送され、好評であったため、続編が作られることになった。"""


def test_wiki40b():
    """The line after each _START_PARAGRAPH_, split at _NEWLINE_; nothing under 10 characters, no titles."""
    assert PREPROCESSORS["wiki40b/ja"](ARTICLE) == [
        "「教科書には決して載らない」日本人の謎やしきたりを多角的に検証する番組。",
        "ちょうど十文字の文です",
        "2009年1月1日に放送され、好評であったため、続編が作られることになった。",
    ]


@pytest.mark.parametrize(
    ("document", "texts"),
    [
        ("", []),
        ("_START_ARTICLE_\n題だけの記事です、段落はありません\n", []),
        ("_START_PARAGRAPH_", []),
        ("_START_PARAGRAPH_\n一二三四五六七八九", []),
        ("_START_PARAGRAPH_\n一二三四五六七八九十\n次の行は段落ではありません", ["一二三四五六七八九十"]),
        (
            "_START_PARAGRAPH_\n一二三四五六七八九十_NEWLINE__NEWLINE_一二三四五六七八九十百",
            ["一二三四五六七八九十", "一二三四五六七八九十百"],
        ),
    ],
)
def test_wiki40b_edges(document, texts):
    assert PREPROCESSORS["wiki40b/ja"](document) == texts


@pytest.mark.parametrize(
    ("document", "texts"),
    [("一行目\n二行目\n", ["一行目二行目"]), ("\n", []), ("", []), ("短", ["短"]), ("空白 \n", ["空白 "])],
)
def test_cc100(document, texts):
    assert PREPROCESSORS["huggingface:cc100/lang=ja"](document) == texts


def test_lm1b_as_it_is():
    assert PREPROCESSORS["lm1b"](" The Dow\nrose . ") == [" The Dow\nrose . "]


def test_a_dataset_has_its_own_or_the_one_that_is_named():
    assert for_dataset("wiki40b/ja", None, "").preprocessor == "wiki40b/ja"
    assert for_dataset("jsonl:x", None, "").preprocessor == "plain"
    assert for_dataset("text:ja.txt.xz", "huggingface:cc100/lang=ja", "")("一\n二") == ["一二"]


def test_unicode_normalization_comes_first_and_is_off_by_default():
    document = "ﾊﾝｶｸ①ＡＢＣ が"  # half-width kana, compatibility characters, a combining mark
    assert Preprocessing("plain")(document) == [document]
    assert Preprocessing("plain", "NFKC")(document) == ["ハンカク1ABC が"]


def test_fingerprint_follows_the_function(monkeypatch):
    before = Preprocessing("plain").fingerprint
    assert before == Preprocessing("plain").fingerprint
    assert before != Preprocessing("plain", "NFKC").fingerprint
    monkeypatch.setitem(dataset_preprocessor.PREPROCESSORS, "plain", lambda document: [document.upper()])
    assert before != Preprocessing("plain").fingerprint


CODE = """
import re

LEAST = 3
MARK = re.compile("。")

def lines(document):
    return (MARK.sub("", line) for line in document.split(" "))

def mine(document):
    found = []
    for line in lines(document):
        if len(line) >= LEAST:
            found.append(line)
    return found
"""
EDITS = [
    ("            found.append(line)", "            pass\n    found.append(line)"),
    ("    found.append", "    found.append"),
    ('split(" ")', 'split("\u3000")'),
    ("LEAST = 3", "LEAST = 4"),
    ('compile("。")', 'compile("、")'),
]


def test_fingerprint_follows_all_that_a_function_uses(tmp_path, monkeypatch):
    """Where a line is indented, which white space it means, a constant and a function beside it."""

    def fingerprint(number: int, code: str) -> str:
        (tmp_path / f"corpus_{number}.py").write_text(code)
        mine = importlib.import_module(f"corpus_{number}").mine
        monkeypatch.setitem(dataset_preprocessor.PREPROCESSORS, "plain", mine)
        return Preprocessing("plain").fingerprint

    monkeypatch.syspath_prepend(str(tmp_path))
    found = [fingerprint(number, CODE.replace(*edit)) for number, edit in enumerate(EDITS)]
    assert len(set(found)) == len(EDITS)
    assert fingerprint(len(EDITS), CODE) == found[1]


CONSTANTS = [
    "['。', '、']",
    "['。', '！']",
    "('。', '、')",
    "b'\\xe3'",
    "bytearray(b'\\xe3')",
    "{'。': ['、']}",
    "{'。': ['！']}",
    "{'。', '、', '！', '？'}",
    "{'。', '、', '！', '…'}",
    "{('。', frozenset(['、', '！'])): 1}",
    "{('。', frozenset(['、', '…'])): 1}",
    "[{'。': {'、', None}}, {}]",
    "[{'。': {'、', 1.5}}, {}]",
    f"re.compile('{'。' * 300}！')",
    f"re.compile('{'。' * 300}？')",
]
TELL = """
import importlib, sys
from transformer_lm.data import dataset_preprocessor
for name in sys.argv[1:]:
    dataset_preprocessor.PREPROCESSORS["plain"] = importlib.import_module(name).mine
    print(dataset_preprocessor.Preprocessing("plain").fingerprint)
"""


def test_fingerprint_follows_constants_of_all_kinds(tmp_path):
    """And is the same in another process, where sets are in another order, and objects lie elsewhere."""
    values = [*CONSTANTS, "[len, mine, object()]"]
    for number, value in enumerate(values):
        code = f"import re\ndef mine(document):\n    return [document] if TABLE else []\nTABLE = {value}\n"
        (tmp_path / f"corpus_{number}.py").write_text(code, encoding="utf-8")
    command = [sys.executable, "-c", TELL, *(f"corpus_{number}" for number in range(len(values)))]
    told = []
    for seed in ("1", "2"):
        environment = os.environ | {
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)]),
        }
        told.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split())
    assert told[0] == told[1]
    assert len(set(told[0])) == len(values)


@pytest.mark.parametrize("arguments", [("nosuch",), ("plain", "NFX")])
def test_unknown_names(arguments):
    with pytest.raises(UserError, match="must be"):
        Preprocessing(*arguments)


@pytest.mark.parametrize("name", sorted(PREPROCESSORS.keys() - {"conversations"}))
@given(st.text(st.characters()))
def test_texts_can_be_written_as_utf_8(name, document):
    """Whatever Python can hold; half a surrogate pair becomes U+FFFD, NUL goes, all else stays."""
    texts = dataset_preprocessor.Preprocessing(name)(document)
    assert "\0" not in "".join(texts)
    "".join(texts).encode()


@given(st.text(st.characters(), min_size=1))
def test_conversations_can_be_written_as_utf_8(said):
    """Of messages the same."""
    document = conversations.document({"instruction": said, "output": f"{said}。"}, "text", "line 1")
    asked, answered = json.loads(*dataset_preprocessor.Preprocessing("conversations")(document))
    expected, _ = dataset_preprocessor.without_impossible_characters(said)
    assert (asked["content"], answered["content"]) == (expected, f"{expected}。")


@pytest.mark.parametrize("missing", ["", " \n", []])
def test_a_conversation_ends_before_an_answer_that_is_missing(missing):
    """As a null is read, which tables have; whoever learnt it would say nothing."""
    turns = [
        ("user", "一"),
        ("assistant", "二"),
        ("user", "三"),
        ("assistant", missing),
        ("user", "五"),
        ("assistant", "六"),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    read = Preprocessing("conversations")
    assert [json.loads(text) for text in read(json.dumps(messages))] == [messages[:2]]
    assert read(json.dumps(messages[2:])) == []


def test_impossible_characters_are_counted():
    clean = dataset_preprocessor.without_impossible_characters
    assert clean("a\0\0b\ud83d\udd00\ud83dc") == ("ab\ufffd\ufffd\ufffdc", {"nul_characters": 2, "lone_surrogates": 3})
    assert clean("𠮷🎉\ufffd") == ("𠮷🎉\ufffd", {"nul_characters": 0, "lone_surrogates": 0})
