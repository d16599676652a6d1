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
        assert [message["role"] for message in messages] == ["user", "assistant"] * 3


def test_instructions_of_validation_are_never_trained_on():
    """Of all that is trained on, not of a sample alone: every wording of every word."""
    asked = {split: {m["content"] for messages in said for m in messages[::2]} for split, said in SAID.items()}
    assert len(asked["validation"]) > 400
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
        plot, words = mukashi.plan(number)
        assert read_tale(plot.tell(words)) == words
    tale = mukashi.tale(0)
    for wrong in (tale[1:], tale + "。", tale.replace("、", "", 1), "", tale[:40]):
        assert read_tale(wrong) is None


def test_a_word_that_comes_again_must_be_the_same():
    tale = mukashi.tale(0)
    _, words = mukashi.plan(0)
    name = words["男の名"]
    other = next(word for word in mukashi.WORDS["男の名"].split() if word != name)
    assert tale.count(name) > 1
    assert read_tale(tale.replace(name, other, 1)) is None
    assert read_tale(tale.replace(name, other)) == words | {"男の名": other}


def test_judge():
    judge = MukashiChat().judge
    for messages in SAID["validation"]:
        for turn in (1, 3, 5):
            until = messages[: turn + 1]
            assert judge(until, until[-1]["content"])
            assert not judge(until, until[-1]["content"] + "。")
            assert not judge(until, "")
    for one, other in zip(SAID["train"], SAID["train"][1:], strict=False):
        asked = one[0]["content"]
        words = read_tale(other[1]["content"])
        names = [word if isinstance(word, str) else word[0] for word in words.values()]
        right = any(name in asked for name in names)
        assert judge(one[:2], other[1]["content"]) <= right  # never right without a word that was asked for
