"""Streams of text: whole characters alone, and joined they are what the tokenizer makes of all ids."""

import io

import pytest
import regex
import sentencepiece
from conftest import FIXTURE
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_lm.generation.streaming import Detokenizer, TextStream, begun_stop, last_cluster
from transformer_lm.tokenizer import Tokenizer

OPTIONS = {
    "bytes": {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "bytes_plain": {"byte_fallback": True, "add_dummy_prefix": False},
    "unknown": {"user_defined_symbols": "\n,👨‍👩‍👧"},
}
# Of several, what tears: marks, joined emoji, flags, Korean letters, half-width voiced kana.
TORN = "がか\u3099ハ゛ﾊﾞe\u0301👨‍👩‍👧👍🏽🇯🇵🇫🇷각❤\ufe0f \n\r𠮷猫\u200d"


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    """Tokenizers that differ in how they treat bytes and spaces."""
    found = {"original": Tokenizer.load(FIXTURE / "sentencepiece_model")}
    for name, options in OPTIONS.items():
        model = io.BytesIO()
        sentences = ["昔々 ある ところに 猫がいました。", "the cat sat on the mat", "か\u3099"] * 5
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=model, vocab_size=340 if "byte_fallback" in options else 60,
            hard_vocab_limit=False, minloglevel=2, unk_id=0, bos_id=1, eos_id=2, **options,
        )  # fmt: skip
        found[name] = Tokenizer(model.getvalue())
    return found


def token_ids(data, tokenizer: Tokenizer, label: str) -> list[int]:
    """Any ids, or those of a text that tears."""
    random_ids = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30)
    few_bytes = st.lists(st.sampled_from([*tokenizer.encode("あ👍🏽é 猫"), 0, 1, 2]), max_size=20)
    texts = st.text(TORN, max_size=12).map(tokenizer.encode)
    return data.draw(st.one_of(random_ids, few_bytes, texts), label)


@pytest.mark.parametrize("name", ["original", *OPTIONS])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_parts_joined_are_the_text(tokenizers, name, data):
    tokenizer = tokenizers[name]
    prompt, tokens = token_ids(data, tokenizer, "prompt"), token_ids(data, tokenizer, "tokens")
    whole = tokenizer.decode(prompt + tokens)
    for stream in (Detokenizer(tokenizer, prompt), TextStream(tokenizer, prompt)):
        parts = [stream.push(token) for token in tokens]
        text = "".join(parts) + stream.finish()
        assert whole.endswith(text)
        before = Detokenizer(tokenizer)
        assert "".join(map(before.push, prompt)) + text == whole


@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(TORN, max_size=15))
def test_no_character_comes_in_halves(tokenizers, name, text):
    """Wherever a part ends, the characters of the whole text end, too, as the library regex cuts them."""
    tokenizer = tokenizers[name]
    tokens = tokenizer.encode(text)
    whole = tokenizer.decode(tokens)
    borders = {0} | {match.end() for match in regex.finditer(r"\X", whole)}
    stream, shown = TextStream(tokenizer), ""
    for token in tokens:
        shown += stream.push(token)
        assert "\ufffd" not in shown
        assert len(shown) in borders
    assert shown + stream.finish() == whole


@settings(max_examples=100, deadline=None)
@given(data=st.data(), text=st.text("あい猫ab", max_size=20))
def test_stop_strings(tokenizers, data, text):
    """The text ends before the one that is complete first, and nothing of it is ever shown."""
    tokenizer = tokenizers["bytes"]
    stop = data.draw(st.lists(st.text("あい猫ab", min_size=1, max_size=4), max_size=3))
    tokens = tokenizer.encode(text)
    texts = [tokenizer.decode(tokens[:count]) for count in range(len(tokens) + 1)]
    whole = next((text for text in texts if any(one in text for one in stop)), texts[-1])  # no token after it is read
    end = min((whole.find(one) for one in stop if one in whole), default=len(whole))
    stream, shown = TextStream(tokenizer, stop=stop), ""
    for token in tokens:
        shown += stream.push(token)
        assert whole[:end].startswith(shown)
        if stream.stopped:
            break
    assert shown + stream.finish() == whole[:end]
    assert stream.stopped == any(one in whole for one in stop)


def test_a_part_comes_as_soon_as_it_may(tokenizers):
    """Text waits for the next character alone, or while it may be the beginning of a stop string."""
    tokenizer = tokenizers["original"]
    tokens = tokenizer.encode("吾輩は猫である。名前はまだ無い。")
    stream, shown = TextStream(tokenizer), ""
    for number, token in enumerate(tokens):
        shown += stream.push(token)
        assert len(shown) >= len(tokenizer.decode(tokens[: number + 1]).rstrip("\ufffd")) - 1
    assert begun_stop("猫である", ["あるか", "ない"]) == 2
    assert begun_stop("猫である", ["です"]) == 4
    assert last_cluster("猫" + "\u3099" * 1000) > 900  # but marks without end do not hold a text back for ever


@pytest.mark.parametrize("text", ["", "鬱"])
def test_prompts_of_control_pieces_and_bytes_cost_no_more_than_others(tokenizers, monkeypatch, text):
    """They are decoded once, and a token behind a few others, if none of them is a whole piece, too."""
    tokenizer, sizes = tokenizers["bytes"], []
    decode = Tokenizer.decode

    def watched(self, tokens):
        sizes.append(len(tokens))
        return decode(self, tokens)

    tokens = ([1] + [id for id in tokenizer.encode(text) if tokenizer.byte_of(id) is not None]) * 500
    assert len(tokens) >= 500
    monkeypatch.setattr(Tokenizer, "decode", watched)
    stream = Detokenizer(tokenizer, tokens)
    assert sum(sizes) < 2 * len(tokens)
    sizes.clear()
    assert ("".join(map(stream.push, tokenizer.encode("猫が"))) + stream.finish()).strip() == "猫が"
    assert max(sizes) < 12
