"""What the loss counts of conversations, through rows that are cut anywhere: what the assistant says, and no more."""

import json
from collections import Counter

import numpy as np
import pytest
from conftest import FIXTURE

from transformer_lm.configs import v2
from transformer_lm.data import packing, tokenizer_training
from transformer_lm.data.corpora import mukashi, mukashi_chat
from transformer_lm.data.dataset_preprocessor import CONVERSATIONS, Preprocessing
from transformer_lm.data.encoding import _spread, encode_conversations
from transformer_lm.tokenizer import EOS_ID, Tokenizer
from transformer_lm.tokenizer.turns import Turns

CONVERSATIONS_SAID = [mukashi_chat.conversation("train", number) for number in range(2 * 10**9, 2 * 10**9 + 30)]


@pytest.fixture(scope="module", params=["pieces", "words"])
def turns(request) -> Turns:
    if request.param == "words":
        return Turns.of(Tokenizer.load(FIXTURE / "sentencepiece_model"))
    tales = [mukashi.tale(number) for number in range(100)]
    return Turns.of(Tokenizer(tokenizer_training.train([(tales, 1.0)], 1300, 20_000, v2.SPM_OPTIONS)))


def batch_of(turns: Turns, conversations: list, row_length: int) -> dict[str, np.ndarray]:
    encoded = encode_conversations(turns.tokenizer, [json.dumps(messages) for messages in conversations])
    dtype = packing.row_dtype(turns.tokenizer.vocab_size, has_unscored=True)
    rows = packing.pack((one.tokens for one in encoded), row_length, dtype)
    return packing.read_records(np.stack([np.frombuffer(row.record(), np.uint8) for row in rows]), dtype)


def test_a_row(turns):
    said = ["誰？", "太助です。", "なぜ？", "猿だから。"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    batch = batch_of(turns, [messages], 128)
    ids, is_answer = turns.encode(messages)
    count = len(ids) + 1
    np.testing.assert_array_equal(batch["targets"][0, :count], [*ids, EOS_ID])
    np.testing.assert_array_equal(batch["inputs"][0, 1:count], ids)
    np.testing.assert_array_equal(batch["scored"][0, :count], [*is_answer, True])
    assert not batch["scored"][0, count:].any()
    assert batch["characters"].tolist() == [len("太助です。猿だから。")]
    assert batch["bytes"].tolist() == [3 * len("太助です。猿だから。")]


def test_cut_rows_count_the_same(turns):
    """Turns that go on in another row are still the assistant's, or still are not."""
    whole = [batch_of(turns, [messages], 1024) for messages in CONVERSATIONS_SAID]
    cut = batch_of(turns, CONVERSATIONS_SAID, 40)

    def pairs(batch) -> Counter:  # each token with the one before it, and whether it counts
        here = batch["segments"] > 0
        return Counter(zip(*(batch[name][here].tolist() for name in ("inputs", "targets", "scored")), strict=True))

    assert pairs(cut) == sum(map(pairs, whole), Counter())
    assert cut["characters"].sum() == sum(batch["characters"].sum() for batch in whole)
    assert cut["inputs"].max() < turns.tokenizer.vocab_size


def test_characters_sum_to_the_text_whatever_is_left_of_it():
    sizes = np.array([[1, 3], [0, 0], [0, 0], [2, 6]], np.int32)
    for ids in ([2], [3, 2], [3, 0, 3, 2]):
        assert _spread(sizes[ids], "\u200bあa").sum(axis=0).tolist() == [3, 7]


def test_order_of_turns():
    read = Preprocessing(CONVERSATIONS)
    user, assistant = {"role": "user", "content": "誰？"}, {"role": "assistant", "content": "太助です。"}
    assert read(json.dumps([user, assistant])) == read(json.dumps([user, assistant, user]))
    for odd in ([], [user], [assistant], [user, user, assistant], [user, {"role": "tool", "content": ""}, assistant]):
        assert read(json.dumps(odd)) == []
