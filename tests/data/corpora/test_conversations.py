"""Conversations in the forms that people have them, read from files and data sets as they lie on the hub."""

import json

import pytest

from transformer_lm.data import corpora
from transformer_lm.data.corpora import Options, conversations
from transformer_lm.errors import UserError

ASKED, ANSWERED = "富士山の高さは？", "3776メートルです。"
TURNS = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}]
FORMS = {
    "messages": {"id": 1, "messages": TURNS},
    "oasst1-chat": {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWERED}]},
    "alpaca": {"instruction": ASKED, "input": "", "output": ANSWERED},
    "dolly-15k": {"instruction": ASKED, "context": None, "response": ANSWERED, "category": "open_qa"},
    "dolly-15k-ja": {"index": "0", "category": "open_qa", "instruction": ASKED, "input": "", "output": ANSWERED},
    "ichikara": {"ID": "1", "text": ASKED, "output": ANSWERED},
    "question": {"question": ASKED, "answer": ANSWERED},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    assert json.loads(conversations.document(FORMS[form], "text", "here")) == TURNS


@pytest.mark.parametrize("form", FORMS)
def test_forms_in_one_table(form):
    """Which has all their fields in every row, null where a row has none."""
    names = {name for record in FORMS.values() for name in record}
    said = conversations.document({name: FORMS[form].get(name) for name in sorted(names)}, "text", "here")
    assert json.loads(said) == TURNS
    turn = {"content": None, "from": "human", "role": None, "value": ASKED}
    said = conversations.document({"messages": [turn]}, "text", "here")
    assert json.loads(said) == TURNS[:1]


def test_input_follows_the_instruction():
    record = {"instruction": "要約してください。", "input": "猿が柿を食べた。", "output": "猿と柿。"}
    said = json.loads(conversations.document(record, "text", "here"))
    assert [message["content"] for message in said] == ["要約してください。\n\n猿が柿を食べた。", "猿と柿。"]


def test_turns_in_a_field_of_another_name():
    assert json.loads(conversations.document({"dialog": TURNS}, "dialog", "here")) == TURNS


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"body": "…"}, "here: no conversation in the fields body; known are messages"),
        ("…", "here: not an object"),
        ({"messages": ["…"]}, "here: a turn of 'messages' is not an object with role and content"),
        ({"messages": [{"role": "user", "content": 7}]}, "here: a turn of 'messages' says a int"),
    ],
)
def test_what_is_none(record, words):
    with pytest.raises(UserError, match=words):
        conversations.document(record, "text", "here")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "huggingface"])
@pytest.mark.parametrize("form", ["messages", "dolly-15k"])
def test_sources(kind, form, tmp_path):
    records = [FORMS[form]] * 3
    if kind == "parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(records), tmp_path / "train.parquet")
        name = f"parquet:{tmp_path}/*"
    elif kind == "huggingface":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(records), tmp_path / "train-00000-of-00001.parquet")
        name = f"huggingface:{tmp_path}"
    else:
        (tmp_path / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        name = f"jsonl:{tmp_path}/chat.jsonl"
    documents = corpora.open_documents(name, "train[1:]", Options(conversations=True))
    assert [json.loads(document) for document in documents] == [TURNS] * 2


def test_errors_name_the_place(tmp_path):
    (tmp_path / "chat.jsonl").write_text(json.dumps(FORMS["messages"]) + '\n{"text": "昔々"}\n')
    documents = corpora.open_documents(f"jsonl:{tmp_path}/chat.jsonl", "train", Options(conversations=True))
    with pytest.raises(UserError, match=r"chat\.jsonl, line 2: no conversation in the fields text; known are messages"):
        list(documents)
    for name in ("mukashi", f"text:{tmp_path}/chat.jsonl", "wiki40b/ja"):
        with pytest.raises(UserError, match="has texts; with conversations=True: jsonl, parquet"):
            corpora.open_source(name, Options(conversations=True))
    with pytest.raises(UserError, match="has conversations: set conversations=True"):
        corpora.open_source("mukashi_chat")
