"""Conversations about tales: what is asked, what is answered, and that the judge knows right from wrong."""

import json

from transformer_lm.data.corpora import mukashi, mukashi_chat
from transformer_lm.data.corpora.mukashi_chat import MukashiChat, conversation, read_tale

NUMBERS = {split: list(numbers)[:400] for split, numbers in mukashi_chat.SPLITS.items()}
SAID = {split: [conversation(split, number) for number in numbers] for split, numbers in NUMBERS.items()}


def test_turns_and_shards():
    source = MukashiChat()
    assert source.size("train") == 20_000
    read = [json.loads(document) for document in source.read("train", 10_000, 10_003, 0, 1)]
    assert read == [conversation("train", 2 * 10**9 + 10_000 + i) for i in range(3)]
    for messages in SAID["train"] + SAID["validation"]:
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert len(messages) in (6, 8, 10)


def test_instructions_of_validation_are_never_trained_on():
    """Of all that is trained on, not of a sample alone: every wording of every word."""
    asked = {split: {m["content"] for messages in said for m in messages[::2]} for split, said in SAID.items()}
    assert len(asked["validation"]) > 400  # tales that the user tells among them
    trained = {m["content"] for i in range(5_000) for m in conversation("train", 2 * 10**9 + i)[::2]}
    assert not asked["validation"] & trained
    kinds = [*mukashi_chat.QUESTION["kinds"], mukashi_chat.REQUEST, mukashi_chat.RETELLING]
    for kind in kinds:
        parts = [
            set(mukashi_chat.wordings(split, mukashi_chat.QUESTION | kind, word="猿", old="狐")) for split in NUMBERS
        ]
        assert not parts[0] & parts[1]
        assert all(parts)


def test_tales_are_read_back():
    for number in range(300):
        plot, words = mukashi.plan(number, mukashi_chat.PLOTS)
        assert read_tale(plot.tell(words)) == words
    tale = plot.tell(words)
    for wrong in (tale[1:], tale + "。", tale.replace("、", "", 1), "", tale[:40], mukashi.tale(0)):
        assert read_tale(wrong) is None


def test_a_word_that_comes_again_must_be_the_same():
    plot, words = mukashi.plan(0, mukashi_chat.PLOTS)
    tale, animal = plot.tell(words), words["動物"]
    other = next(word for word in plot.slots["動物"] if word != animal)
    assert tale.count(animal) == 2
    assert read_tale(tale.replace(animal, other, 1)) is None
    assert read_tale(tale.replace(animal, other)) == words | {"動物": other}


def test_judge():
    judge = MukashiChat().judge
    for messages in SAID["validation"]:
        for turn in range(1, len(messages), 2):
            until = messages[: turn + 1]
            assert judge(until, until[-1]["content"])
            assert not judge(until, until[-1]["content"] + "。")
            assert not judge(until, "")


def test_a_request_is_met_by_any_tale_that_has_what_it_names():
    judge = MukashiChat().judge
    plot, words = mukashi.plan(0, mukashi_chat.PLOTS)
    words |= {"動物": "鶴", "宝物": "小判"}
    right = plot.tell(words)
    for asked, tale, good in [
        ("鶴の昔話をしてください。", plot.tell(words | {"宝物": "金の鈴"}), True),
        ("鶴の昔話をしてください。", plot.tell(words | {"動物": "猿"}), False),
        ("鶴と小判の昔話をしてください。", right, True),
        ("鶴と小判の昔話をしてください。", plot.tell(words | {"宝物": "金の鈴"}), False),
        ("鶴の昔話をしてください。", mukashi.tale(0), False),
    ]:
        assert judge([{"role": "user", "content": asked}, {"role": "assistant", "content": right}], tale) is good
