"""The tokenizer: what it learns from, where it is written, and what it says when it cannot."""

import os
import subprocess
import sys
import unittest.mock

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_fork

from transformer_lm import tokenizer
from transformer_lm.data import tokenizer_training
from transformer_lm.data.corpora import mukashi
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
    models = [tokenizer_training.train([(TALES, 1.0)], **ARGUMENTS) for _ in range(2)]
    assert models[0] == models[1]
    spm = tokenizer.Tokenizer(models[0])
    assert spm.vocab_size == 900
    processor = sentencepiece.SentencePieceProcessor(model_proto=models[0])
    assert len({processor.get_score(i) % 1 for i in range(3, 900)}) > 100  # BPE's scores would be -0, -1, -2, ...


def test_cuts_alike_wherever_it_stands():
    """Scores are round, so that no rounding decides between ways to cut that are equally good."""
    texts = [mukashi.tale(number) + "…" * (number % 9) for number in range(100)]
    model = tokenizer_training.train(
        [(texts, 1.0)], vocab_size=1000, max_corpus_chars=100_000, options="--byte_fallback=true"
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    scores = [processor.get_score(i) for i in range(processor.vocab_size())]
    assert all((score * 256).is_integer() for score in scores)
    spm = tokenizer.Tokenizer(model)
    dots = [piece for piece in spm.pieces("「" + "…" * 17) if set(piece) == {"."}]
    assert len(dots) > 3
    for number in range(100):
        pieces = spm.pieces(mukashi.tale(number) + "「" + "…" * 17)
        assert [piece for piece in pieces if set(piece) == {"."}] == dots


def test_options_are_passed_through():
    options = "--character_coverage=0.98 --byte_fallback=true"
    spm = tokenizer.Tokenizer(tokenizer_training.train([(TALES, 1.0)], **ARGUMENTS | {"options": options}))
    assert spm.decode(spm.encode("🍣")) == "🍣"
    plain = tokenizer.Tokenizer(tokenizer_training.train([(TALES, 1.0)], **ARGUMENTS))
    assert plain.encode("🍣")[-1] == tokenizer.UNK_ID


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("あいう\n", max_size=3000), max_size=20), st.integers(1, 8000))
def test_sample_is_bounded_and_in_order(texts, max_chars):
    sample = tokenizer_training.sample_texts(iter(texts), max_chars)
    assert sum(map(len, sample)) <= max_chars
    assert sample == tokenizer_training.sample_texts(texts, max_chars)
    assert sample or not "".join(texts).strip("\n")
    joined, at = "\n".join(texts), 0
    for run in sample:
        at = joined.index(run, at) + len(run)


def test_sample_is_spread_over_the_corpus():
    texts = [chr(0x4E00 + i) * 1000 for i in range(1000)]
    numbers = [ord(run[0]) - 0x4E00 for run in tokenizer_training.sample_texts(texts, 200_000)]
    assert len(numbers) == 200
    assert all(20 < sum(low <= n < low + 250 for n in numbers) < 80 for low in range(0, 1000, 250))


def test_everything_is_read_when_it_fits():
    assert "".join(tokenizer_training.sample_texts(TALES, 10**9)) == "".join(TALES)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 100_000}, "vocab_size=100000 is more than this corpus can fill; set vocab_size to"),
        ({"vocab_size": 100}, "vocab_size=100 is too small: this corpus has"),
        ({"options": "character_coverage=1"}, "'character_coverage=1' is not of the form --name=value"),
        ({"options": '--user_defined_symbols="「'}, "cannot be read: No closing quotation"),
        ({"options": "--input=corpus.txt"}, "--input is not yours to set"),
        ({"options": "--model_prefix=m"}, "--model_prefix is not yours to set"),
        ({"options": "--seed_sentencepieces_file=/none"}, "--seed_sentencepieces_file=/none: no such file"),
        ({"options": "--character_coverage=99.95"}, "SentencePiece cannot train"),
        ({"options": "--no_such_option=1"}, "no_such_option"),
        ({"mixture": [([], 1.0)]}, "holds no text"),
    ],
)
def test_errors_in_plain_words(changes, words):
    with pytest.raises(UserError, match=words) as error:
        tokenizer_training.train(**{"mixture": [(TALES, 1.0)], **ARGUMENTS} | changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 100])
def test_foreign_files(tmp_path, content):
    (tmp_path / "model").write_bytes(content)
    with pytest.raises(UserError, match=r"is not a SentencePiece model|is empty"):
        tokenizer.Tokenizer.load(tmp_path / "model")


@pytest.mark.parametrize("options", ["--unk_id=3 --pad_id=0", "--eos_id=-1", "--bos_id=5"])
def test_other_special_ids_are_refused(options):
    with pytest.raises(UserError, match=r"ids \(unk, bos, eos\)|cannot train"):
        tokenizer_training.train([(TALES, 1.0)], **ARGUMENTS | {"options": options})
    with pytest.raises(UserError, match=r"ids \(unk, bos, eos\)|cannot train"):
        tokenizer_training.check_options(options, 900)


@pytest.mark.parametrize("option", ["num_threads=0", "seed_sentencepiece_size=-1", "minloglevel=x"])
def test_sizes_are_refused_before_the_corpus_is_read(option):
    with pytest.raises(UserError, match=f"--{option} is not possible"):
        tokenizer_training.check_options(f"--{option}", 900)


@pytest.mark.parametrize("name", ["vocab_size", "input", "model_prefix", "arg", "logstream", "model_writer"])
@pytest.mark.parametrize("value", ["=1", "=8000", "=--model_prefix=m", ""])
def test_what_is_no_ones_to_set_is_refused_before_the_corpus_is_read(name, value):
    with pytest.raises(UserError, match=f"^spm_train_options: --{name} is not yours to set: "):
        tokenizer_training.check_options(f"--character_coverage=1.0 --{name}{value}", 900)


@pytest.mark.parametrize(
    "options",
    ["", "--byte_fallback", "--model_type=bpe --byte_fallback=true", "--pad_id=3", "--character_coverage=0.98"],
)
def test_good_options_pass_the_trial(options):
    tokenizer_training.check_options(options, 900)


@pytest.mark.parametrize(
    ("options", "fixed"),
    [
        ("", 3),
        ("--pad_id=3", 4),
        ("--byte_fallback=true", 259),
        ("--control_symbols=<a>,<b> --user_defined_symbols=ました", 6),
    ],
)
def test_sizes_that_hold_no_learned_piece_are_refused_before_the_corpus_is_read(options, fixed):
    tokenizer_training.check_options(options, fixed + 1)
    with pytest.raises(UserError, match=f"^vocab_size={fixed} is too small: {fixed} pieces are taken"):
        tokenizer_training.check_options(options, fixed)


@pytest.fixture(scope="module")
def lossless():
    """Bytes for what is unknown, and no normalization: what a tokenizer that keeps every string is trained with."""
    options = "--byte_fallback=true --normalization_rule_name=identity --remove_extra_whitespaces=false"
    arguments = ARGUMENTS | {"options": options, "vocab_size": 1200}
    return tokenizer.Tokenizer(tokenizer_training.train([(TALES, 1.0)], **arguments))


@pytest.fixture(scope="module")
def originals():
    """The options of the original's japanese_0.1b_v1."""
    arguments = ARGUMENTS | {"options": "--character_coverage=0.9995 --byte_fallback=true", "vocab_size": 1200}
    return tokenizer.Tokenizer(tokenizer_training.train([(TALES, 1.0)], **arguments))


UNICODE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=40)


@settings(max_examples=500, deadline=None)
@given(UNICODE)
def test_byte_fallback_keeps_every_string(lossless, text):
    """All of Unicode but U+2581, which SentencePiece takes for a space."""
    assert lossless.decode(lossless.encode(text)) == text
    assert tokenizer.UNK_ID not in lossless.encode(text)


@pytest.mark.parametrize(
    "text", ["🍣👨‍👩‍👧", "ﾊﾝｶｸｶﾅ", "𠮷野家", "か\u3099", "  空白　二つ  ", "タブ\tと\n改行", "<s></s><unk>"]
)
def test_byte_fallback_keeps(lossless, text):
    assert lossless.decode(lossless.encode(text)) == text


@settings(max_examples=500, deadline=None)
@given(UNICODE)
def test_the_originals_options_keep_the_normalized_string(originals, text):
    """With SentencePiece's own normalization (nmt_nfkc, white space squeezed) what it left is kept."""
    kept = originals.decode(originals.encode(text))
    assert originals.decode(originals.encode(kept)) == kept
    plain = sentencepiece.SentencePieceProcessor(model_proto=originals.model)
    assert kept == plain.normalize(text).replace("\u2581", " ").strip(" ")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("昔々あるところに \n。", min_size=1, max_size=30), max_size=40).map("\n".join))
def test_long_texts_are_encoded_in_parts(originals, text):
    """The same ids as of the whole, wherever the parts are cut."""
    whole = originals.encode(text)
    with unittest.mock.patch.object(tokenizer, "ENCODE_CHARS", 35):
        [ids] = originals.encode_texts([text])
    assert ids.tolist() == [*whole, tokenizer.EOS_ID]


def test_a_long_line_is_cut_anywhere():
    assert list(tokenizer.split_text("ab\ncdefgh\n\ni", 4)) == ["ab\n", "cdef", "gh\n\n", "i"]


def test_spaces_that_no_piece_has(tmp_path):
    """In an alphabet without them they come in bytes, and go the same way, in an exported tokenizer, too."""
    model = tokenizer_training.train(
        [(["猫がいた。犬もいた。"] * 20, 1.0)], 268, 10**6,
        "--byte_fallback=true --normalization_rule_name=identity --remove_extra_whitespaces=false "
        "--add_dummy_prefix=false --model_type=bpe",
    )  # fmt: skip
    spm = tokenizer.Tokenizer(model)
    text = "猫 犬  猫"
    assert tokenizer.SPACE not in "".join(spm.pieces(text))
    assert spm.decode(spm.encode(text)) == text
    fast_tokenizer = pytest.importorskip("transformer_lm.huggingface.fast_tokenizer")
    assert fast_tokenizer.convert(spm).decode(spm.encode(text)) == text


def test_inspect(tmp_path, originals):
    (tmp_path / "sentencepiece_model").write_bytes(originals.model)
    command = [sys.executable, "-m", "transformer_lm.tokenizer", f"--workdir={tmp_path}", "--inspect", "昔々、ﾊﾞﾅﾅ"]
    done = run_fork(command)
    assert done.returncode == 0, done.stderr
    for piece, token in zip(originals.pieces("昔々、ﾊﾞﾅﾅ"), originals.encode("昔々、ﾊﾞﾅﾅ"), strict=True):
        assert any(piece in line and str(token) in line for line in done.stdout.splitlines())
    assert "characters a token" in done.stdout
    assert "another text: 昔々、バナナ" in done.stdout
    missing = run_fork([*command[:3], "--workdir=/no/such", "--inspect", "昔"])
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "error: No tokenizer at /no/such/sentencepiece_model" in missing.stderr


@pytest.mark.parametrize("text", ["あ\ud83dい", "\udce3", "あ\udc00"])
def test_half_a_surrogate_pair(originals, text):
    """Which Python strings may hold, is U+FFFD wherever text goes in."""
    whole = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
    assert originals.encode(text) == originals.encode(whole)
    assert originals.pieces(text) == originals.pieces(whole)
    np.testing.assert_array_equal(originals.encode_texts([text])[0], originals.encode_texts([whole])[0])


def test_nul_is_encoded(lossless):
    assert lossless.decode(lossless.encode("昔\0々")) == "昔\0々"


@pytest.mark.parametrize("wrong", [-1, 10**6, 2**40])
def test_ids_that_are_no_pieces(originals, wrong):
    with pytest.raises(UserError, match=f"has the ids 0 to {originals.vocab_size - 1}; {wrong} is none of them"):
        originals.decode([5, wrong])


def test_files_that_are_no_models(tmp_path, monkeypatch):
    assert tokenizer.MAX_MODEL_BYTES == 256 << 20
    monkeypatch.setattr(tokenizer, "MAX_MODEL_BYTES", 1 << 20)  # not so much is read here
    with pytest.raises(UserError, match="is not a SentencePiece model: no file"):
        tokenizer.Tokenizer.load(tmp_path)
    with open(tmp_path / "long", "wb") as file:
        file.truncate(tokenizer.MAX_MODEL_BYTES + 1)
    with pytest.raises(UserError, match=r"is not a SentencePiece model: .* over 1 MiB"):
        tokenizer.Tokenizer.load(tmp_path / "long")


@pytest.mark.parametrize("locale", ["C", "ja_JP.eucJP", "de_DE.ISO-8859-1"])
def test_inspect_in_any_locale(tmp_path, originals, locale):
    (tmp_path / "sentencepiece_model").write_bytes(originals.model)
    command = [sys.executable, "-m", "transformer_lm.tokenizer", f"--workdir={tmp_path}", "--inspect", "昔々\udcff"]
    environment = os.environ | {"LC_ALL": locale, "PYTHONUTF8": "0"}
    done = subprocess.run([os.fsencode(part) for part in command], env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "昔" in done.stdout.decode("utf-8")
