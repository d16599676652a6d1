"""The tokenizer: what it learns from, where it is written, and what it says when it cannot."""

import numpy as np
import pytest
import sentencepiece
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_lm import tokenizer
from transformer_lm.corpora import mukashi
from transformer_lm.errors import UserError

TALES = [mukashi.tale(number) for number in range(200)]
ARGUMENTS = {"vocab_size": 900, "max_corpus_chars": 60_000, "options": "--character_coverage=1.0"}


def test_round_trip_and_ids(tales_tokenizer):
    ids = tales_tokenizer.encode(TALES[0])
    assert tales_tokenizer.decode(ids) == TALES[0]
    assert (tokenizer.UNK_ID, tokenizer.BOS_ID, tokenizer.EOS_ID) == (0, 1, 2)
    closed = tales_tokenizer.encode_texts([TALES[0], ""])
    np.testing.assert_array_equal(closed[0], [*ids, tokenizer.EOS_ID])
    np.testing.assert_array_equal(closed[1], [tokenizer.EOS_ID])
    assert tales_tokenizer.decode([*ids, tokenizer.EOS_ID]) == TALES[0]


def test_reads_the_originals_model(original):
    """Ids as the original computed them."""
    spm = tokenizer.Tokenizer.load(original.path / "sentencepiece_model")
    assert spm.vocab_size == original.about["vocab_size"]
    for text, ids in zip(original.about["texts"], original.reference["tokens"], strict=True):
        np.testing.assert_array_equal(spm.encode_texts([text])[0], ids[ids > 0])


def test_training_is_deterministic_and_unigram():
    models = [tokenizer.train([(TALES, 1.0)], **ARGUMENTS) for _ in range(2)]
    assert models[0] == models[1]
    spm = tokenizer.Tokenizer(models[0])
    assert spm.vocab_size == 900
    processor = sentencepiece.SentencePieceProcessor(model_proto=models[0])
    assert len({processor.get_score(i) for i in range(3, 900)}) > 500  # BPE's scores would be -0, -1, -2, ...


def test_options_are_passed_through():
    options = "--character_coverage=0.98 --byte_fallback=true"
    spm = tokenizer.Tokenizer(tokenizer.train([(TALES, 1.0)], **ARGUMENTS | {"options": options}))
    assert spm.decode(spm.encode("🍣")) == "🍣"
    plain = tokenizer.Tokenizer(tokenizer.train([(TALES, 1.0)], **ARGUMENTS))
    assert plain.encode("🍣")[-1] == tokenizer.UNK_ID


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = epath.Path(tmp_path) / "deep" / "sentencepiece_model"
    spm = tokenizer.load_or_train(path, [(TALES, 1.0)], **ARGUMENTS)
    assert path.read_bytes() == spm.model
    assert [child.name for child in path.parent.iterdir()] == [path.name]
    again = tokenizer.load_or_train(path, iter(()), **ARGUMENTS)  # found, not trained again
    assert again.fingerprint == spm.fingerprint


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("あいう\n", max_size=3000), max_size=20), st.integers(1, 8000))
def test_sample_is_bounded_and_in_order(texts, max_chars):
    sample = tokenizer.sample_texts(iter(texts), max_chars)
    assert sum(map(len, sample)) <= max_chars
    assert sample == tokenizer.sample_texts(texts, max_chars)
    assert sample or not "".join(texts).strip("\n")
    joined, at = "\n".join(texts), 0
    for run in sample:
        at = joined.index(run, at) + len(run)


def test_sample_is_spread_over_the_corpus():
    texts = [chr(0x4E00 + i) * 1000 for i in range(1000)]
    numbers = [ord(run[0]) - 0x4E00 for run in tokenizer.sample_texts(texts, 200_000)]
    assert len(numbers) == 200
    assert all(20 < sum(low <= n < low + 250 for n in numbers) < 80 for low in range(0, 1000, 250))


def test_everything_is_read_when_it_fits():
    assert "".join(tokenizer.sample_texts(TALES, 10**9)) == "".join(TALES)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 100_000}, "vocab_size=100000 is more than this corpus can fill; set vocab_size to"),
        ({"vocab_size": 100}, "vocab_size=100 is too small: this corpus has"),
        ({"options": "--character_coverage"}, "'--character_coverage' is not of the form --name=value"),
        ({"options": "--no_such_option=1"}, "no_such_option"),
        ({"mixture": [([], 1.0)]}, "holds no text"),
    ],
)
def test_errors_in_plain_words(changes, words):
    with pytest.raises(UserError, match=words) as error:
        tokenizer.train(**{"mixture": [(TALES, 1.0)], **ARGUMENTS} | changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 100])
def test_foreign_files(tmp_path, content):
    (tmp_path / "model").write_bytes(content)
    with pytest.raises(UserError, match=r"is not a SentencePiece model|is empty"):
        tokenizer.Tokenizer.load(tmp_path / "model")


def test_other_special_ids_are_refused():
    model = tokenizer.train([(TALES, 1.0)], **ARGUMENTS | {"options": "--unk_id=3 --pad_id=0"})
    with pytest.raises(UserError, match="ids"):
        tokenizer.Tokenizer(model)
