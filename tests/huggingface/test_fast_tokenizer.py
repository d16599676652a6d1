"""The fast tokenizer against SentencePiece: the same ids, the same text back."""

import functools
import gzip
import io
import json
import random
import re
import unicodedata
import unittest.mock

import pytest
import sentencepiece
from conftest import FIXTURE
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from transformer_lm import tokenizer
from transformer_lm.configs import mukashi as mukashi_recipe
from transformer_lm.data import tokenizer_training
from transformer_lm.data.corpora import mukashi
from transformer_lm.errors import UserError
from transformer_lm.huggingface import fast_tokenizer

pytest.importorskip("tokenizers")

KEEP_ALL = "--byte_fallback=true --normalization_rule_name=identity --remove_extra_whitespaces=false"
MODELS = {
    "default": "",
    "byte fallback": "--byte_fallback=true --character_coverage=0.98",
    "keeps all": KEEP_ALL,
    "keeps all but extra spaces": "--byte_fallback=true --normalization_rule_name=identity",
    "no dummy prefix": f"{KEEP_ALL} --add_dummy_prefix=false",
    "nfkc": "--byte_fallback=true --normalization_rule_name=nfkc",
    "user-defined": f"{KEEP_ALL} --user_defined_symbols=<sep>,お爺さん",
    "user-defined, bpe": "--model_type=bpe --user_defined_symbols=お爺さん,お爺,。,昔々あるところに",
    "pad piece": f"--pad_id=3 {KEEP_ALL}",
    "normalizes, keeps spaces": "--byte_fallback=true --remove_extra_whitespaces=false",
    "bpe": f"--model_type=bpe {KEEP_ALL}",
    "bpe, default": "--model_type=bpe",
}
# What is easily cut or written otherwise: half-width voiced kana, decomposed kana, marks, spaces, emoji of several
# characters, controls, and the names of pieces.
PARTS = [
    "お爺さん", "が", "ｶﾞ", "か\u3099", "は\u309a", "ﾊﾟ", "é", "e\u0301", "㌀", "㋿", "①", "Ａ", "ﬁ", "　", " ", "  ",
    "\t", "\n", "\r\n", "▁", "🎉", "👨\u200d👩\u200d👧", "🇯🇵", "\u200b", "\ufeff", "\x01", "\0", "\x7f", "<s>", "</s>",
    "<unk>", "<0x41>", "<0xE3>", "<", ">", "<0x4", "<sep>", "。", "……………", "――――", "abc", "123", "\u1100\u1161\u11a8",
    "ก\u0e33", "𠮷",
]  # fmt: skip


@pytest.fixture(scope="module")
def pair():
    """Makes a tokenizer and its fast counterpart, once for each model."""
    made = {}

    def make(name):
        if name not in made:
            texts = [mukashi.tale(number) for number in range(200)] + [" ".join(PARTS[:20])] * 3
            options = f"--character_coverage=1.0 {MODELS[name]}"
            model = tokenizer_training.train([(texts, 1.0)], vocab_size=1200, max_corpus_chars=100_000, options=options)
            slow = tokenizer.Tokenizer(model)
            made[name] = slow, fast_of(slow)
        return made[name]

    return make


def fast_of(slow):
    return fast_tokenizer.convert(slow)


def different(slow, fast, texts: list[str]) -> list[str]:
    """The texts whose ids differ."""
    found = fast.encode_batch(texts, add_special_tokens=False)
    return [text for text, encoding in zip(texts, found, strict=True) if encoding.ids != slow.encode(text)]


def lines_of(path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [line for record in file for line in json.loads(record)["text"].split("\n")]


@functools.cache
def assigned_characters() -> list[str]:
    return [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]


@functools.cache
def random_strings(count: int, seed: int = 0) -> list[str]:
    """Strings of 1 to 30 assigned characters."""
    rng = random.Random(seed)
    return ["".join(rng.choices(assigned_characters(), k=rng.randint(1, 30))) for _ in range(count)]


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=75, deadline=None)
@given(parts=st.lists(st.sampled_from(PARTS) | st.text("あいう昔々 abc", max_size=4), max_size=8))
@example(parts=[])
@example(parts=["\x01"])
@example(parts=[" ", "\x01", " "])
@example(parts=["ｶﾞ", "\u3099"])
def test_same_ids(pair, name, parts):
    slow, fast = pair(name)
    text = "".join(parts)
    assert fast.encode(text, add_special_tokens=False).ids == slow.encode(text)


SYMBOLS = [
    "ました", "お爺さん", "お爺", "爺さん", "さんお", "<sep>", "<|user|>", "Ａ", "か゛", "ｶﾞ", "㌀",
    "①", "。", "、、", "▁c", "d▁", "昔々", "た", "しま", "<s", "s>", "abc", "ab", "bc", "\t",
    "[", ".*", "\\",
]  # fmt: skip


def with_symbols(slow, symbols: list[str]):
    """A model whose first pieces after the control pieces are user-defined symbols."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(slow.model)
    pieces = [piece for piece in proto.pieces if piece.piece not in symbols]
    made = [sentencepiece_model_pb2.ModelProto.SentencePiece(piece=symbol, type=4) for symbol in symbols]
    del proto.pieces[:]
    proto.pieces.extend([*pieces[:3], *made, *pieces[3:]])
    return tokenizer.Tokenizer(proto.SerializeToString())


@pytest.mark.parametrize("name", ["default", "byte fallback", "keeps all", "normalizes, keeps spaces", "bpe, default"])
@pytest.mark.parametrize("seed", range(3))
def test_same_ids_with_random_symbols(pair, name, seed):
    """Overlapping ones, prefixes of one another, such as normalization changes, such as hold what means a space."""
    rng = random.Random(seed)
    symbols = rng.sample(SYMBOLS, 6)
    slow = with_symbols(pair(name)[0], symbols)
    parts = [*PARTS, *SYMBOLS, *symbols * 8, *"あいう昔々 abc"]
    texts = ["".join(rng.choices(parts, k=rng.randint(0, 8))) for _ in range(1_000)]
    fast_tokenizer.check_same_ids(slow, fast_of(slow), texts)
    assert len(different(slow, fast_of(slow), texts)) <= 5  # equally good ways to cut


def test_symbols_count_by_their_length(pair):
    """た ends here more often than it would if every symbol had the same score."""
    slow = with_symbols(pair("keeps all")[0], ["た", "ました"])
    tales = [mukashi.tale(number) for number in range(300)]
    assert different(slow, fast_of(slow), tales) == []


def test_other_ids_are_refused(pair):
    """Where SentencePiece counted otherwise, as other versions of it do."""
    slow = with_symbols(pair("keeps all")[0], ["た", "ました"])
    with unittest.mock.patch.object(fast_tokenizer, "SYMBOL_SCORE", -3.0):
        fast = fast_of(slow)
    with pytest.raises(UserError, match="cannot be exported: a fast tokenizer cuts '昔々ありました' into") as error:
        fast_tokenizer.check_same_ids(slow, fast, ["あ", "昔々ありました"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["default", "keeps all", "no dummy prefix", "bpe, default"])
@pytest.mark.parametrize("special", [True, False])
def test_tokens_added_later(pair, name, special):
    """They are found in a text; what lies between them is cut as in the middle of a text, and all comes back."""
    slow, _ = pair(name)
    fast = fast_of(slow)
    (fast.add_special_tokens if special else fast.add_tokens)(["<|user|>", "<新しい>"])
    user, new = slow.vocab_size, slow.vocab_size + 1
    for text in ("<|user|>昔々<新しい>お爺さん", "昔々<新しい>", "<s>昔々</s><|user|>が", "昔々<|user|> お爺さん"):
        ids = fast.encode(text, add_special_tokens=False).ids
        assert [token for token in ids if token >= user] == [
            {"<|user|>": user, "<新しい>": new}[found] for found in re.findall(r"<\|user\|>|<新しい>", text)
        ]
        assert not {1, 2} & set(ids)
        if 0 not in ids:
            assert fast.decode(ids, skip_special_tokens=False) == text
    between = fast.encode("昔々<|user|>お爺さん", add_special_tokens=False).ids
    assert between[: between.index(user)] == slow.encode("昔々")


@pytest.mark.parametrize("name", MODELS)
def test_same_ids_for_tales_and_back(pair, name):
    slow, fast = pair(name)
    tales = [mukashi.tale(number) for number in range(1_000, 1_200)]
    assert different(slow, fast, tales) == []
    ids = [[token for token in slow.encode(tale) if token] for tale in tales]  # of id 0 SentencePiece makes " ⁇ "
    assert fast.decode_batch(ids) == [slow.decode(tokens) for tokens in ids]


@pytest.mark.parametrize("name", ["keeps all", "keeps all but extra spaces", "no dummy prefix", "bpe"])
def test_same_text_back(pair, name):
    slow, fast = pair(name)
    texts = ["", " ", "  x ", *PARTS, *random_strings(500)]
    ids = [slow.encode(text) for text in texts]
    assert fast.decode_batch(ids) == [slow.decode(tokens) for tokens in ids]


def assert_marks_in_another_order(slow, fast, texts: list[str]):
    """That texts differ by nothing but the order of combining marks, which SentencePiece keeps and NFKC sorts."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=slow.model)
    for text in texts:
        ours, theirs = processor.normalize(text).removeprefix("▁"), fast.normalizer.normalize_str(text)
        assert ours != theirs
        assert unicodedata.normalize("NFC", ours) == unicodedata.normalize("NFC", theirs)


# docs/huggingface.md reports the counts. Which characters are assigned depends on Python's version, and so do they.
@pytest.mark.parametrize(
    ("name", "most"), [("byte fallback", 15), ("keeps all", 0), ("nfkc", 15), ("bpe", 0), ("bpe, default", 15)]
)
def test_random_strings(pair, tenth, name, most):
    slow, fast = pair(name)
    found = different(slow, fast, tenth(random_strings(20_000)))
    assert len(found) <= most
    assert_marks_in_another_order(slow, fast, found)


def test_random_strings_by_the_originals_model(tenth):
    slow = tokenizer.Tokenizer.load(FIXTURE / "sentencepiece_model")
    found = different(slow, fast := fast_of(slow), tenth(random_strings(20_000)))
    assert len(found) <= 15
    assert_marks_in_another_order(slow, fast, found)


@pytest.fixture(scope="module")
def lines(literature, tenth) -> list[str]:
    names = ["wikipedia_leads", "aozora_validation", "aozora_train"]
    return tenth(tenth([line for name in names for line in lines_of(literature / f"{name}.jsonl.gz")]))


@pytest.mark.parametrize("options", ["--byte_fallback=true", KEEP_ALL, f"--model_type=bpe {KEEP_ALL}"])
def test_lines_of_the_literature(lines, options):
    model = tokenizer_training.train(
        [(lines[:40_000], 1.0)], vocab_size=4_000, max_corpus_chars=150_000, options=options
    )
    slow = tokenizer.Tokenizer(model)
    assert different(slow, fast_of(slow), lines) == []


def test_lines_by_the_originals_model(lines):
    """Its scores are not round: where the same pieces may stand in another order SentencePiece's rounding decides."""
    slow = tokenizer.Tokenizer.load(FIXTURE / "sentencepiece_model")
    found = different(slow, fast := fast_of(slow), lines)
    assert len(found) <= 4 + len(lines) / 25_000  # 20 of 400,000
    for line in found:
        assert sorted(fast.encode(line, add_special_tokens=False).ids) == sorted(slow.encode(line))


@pytest.mark.parametrize("name", ["byte fallback", "nfkc"])
def test_every_character(pair, name, tenth):
    """Between others, as what comes before or after may change what becomes of a mark."""
    texts = [f"か{c}ﾊ" for c in assigned_characters()]
    marks = [text for text in texts if unicodedata.combining(text[1]) or unicodedata.decomposition(text[1])]
    texts = tenth(texts) + marks
    assert different(*pair(name), texts) == []


def test_the_demos_model():
    config = mukashi_recipe.get_config()
    texts = [mukashi.tale(number) for number in range(3_000)]
    model = tokenizer_training.train(
        [(texts, 1.0)], vocab_size=config.vocab_size, max_corpus_chars=1_000_000, options=config.spm_train_options
    )
    slow = tokenizer.Tokenizer(model)
    fast = fast_of(slow)
    unseen = [mukashi.tale(number) for number in range(40_000, 41_000)]
    assert different(slow, fast, unseen) == []
    assert fast.decode_batch([slow.encode(text) for text in unseen]) == unseen


def test_begins_with_the_start():
    slow = tokenizer.Tokenizer.load(FIXTURE / "sentencepiece_model")
    text = "夏目漱石は、"
    assert fast_of(slow).encode(text).ids == [0, *slow.encode(text)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model_type": "char"}, "model_type=char"),
        ({"model_type": "word"}, "model_type=word"),
        ({"normalization_rule_name": "nfkc_cf"}, "normalizes by 'nfkc_cf'"),
        ({"user_defined_symbols": "か゛,゛か"}, "normalizes its user-defined symbol 'か゛', which may overlap"),
        ({"user_defined_symbols": [" 、"]}, "removes extra white space, but its user-defined symbol ' 、' has some"),
        ({"user_defined_symbols": "<0x", "byte_fallback": True}, "the piece '<0x', which a fast tokenizer cannot tell"),
        ({"treat_whitespace_as_suffix": True}, "white space as a suffix"),
    ],
)
def test_what_has_no_counterpart(options, words):
    model = io.BytesIO()
    texts = iter([mukashi.tale(number).replace("、", " ") for number in range(100)])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=model, vocab_size=1200, hard_vocab_limit=False, minloglevel=2, **options
    )
    with pytest.raises(UserError, match=words):
        fast_tokenizer.convert(tokenizer.Tokenizer(model.getvalue()))


def test_a_normalization_of_ones_own(tmp_path):
    (tmp_path / "rules.tsv").write_text("61\t62\n")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["abc あいう"] * 10), model_writer=model, vocab_size=11, hard_vocab_limit=False,
        normalization_rule_tsv=str(tmp_path / "rules.tsv"), minloglevel=2,
    )  # fmt: skip
    with pytest.raises(UserError, match="normalizes by 'user_defined'"):
        fast_tokenizer.convert(tokenizer.Tokenizer(model.getvalue()))


def test_texts_of_the_corpus_are_compared(tales_tokenizer, tmp_path, monkeypatch):
    """Where the two cut one of them differently nothing is written."""
    from tokenizers import normalizers

    convert = fast_tokenizer.convert

    def other(tokenizer):
        fast = convert(tokenizer)
        fast.normalizer = normalizers.Sequence([normalizers.Replace("鬼ヶ島", "鬼が島"), fast.normalizer])
        return fast

    monkeypatch.setattr(fast_tokenizer, "convert", other)
    fast_tokenizer.save(tmp_path, tales_tokenizer, 10)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="cuts '昔、鬼ヶ島に' into"):
        fast_tokenizer.save(tmp_path, tales_tokenizer, 10, texts=["昔々", "昔、鬼ヶ島に"])
    assert not (tmp_path / "tokenizer.json").exists()
