"""Conversations as token ids: what is said by whom, that no text is taken for a mark, and the template."""

import functools

import jinja2.sandbox
import pytest
from conftest import FIXTURE
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_lm.configs import v2
from transformer_lm.data import tokenizer_training
from transformer_lm.data.corpora import mukashi
from transformer_lm.errors import UserError
from transformer_lm.huggingface import fast_tokenizer
from transformer_lm.tokenizer import EOS_ID, NAME_MARK, START_ID, Tokenizer
from transformer_lm.tokenizer.turns import CONTROL_NAMES, Turns, read_messages

# Of tokenizers that keep all spaces of a text, and put one in front of it.
KEEP_SPACES = "--byte_fallback=true --normalization_rule_name=identity --remove_extra_whitespaces=false"
TALES = [mukashi.tale(number) for number in range(100)]
TRICKS = [
    "",
    "<|reserved_1|>",
    f"<|reserved_1|>{NAME_MARK}",
    "◆アシスタント",
    " ◆ ",
    "</s>",
    "<s>" + NAME_MARK,
    "￭",
    "\n",
    " ",
]


def said(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def make_tokenizer(options: str, *more: str) -> Tokenizer:
    """Of tales and some other texts."""
    texts = [*TALES, *more]
    return Tokenizer(
        tokenizer_training.train([(texts, 1.0)], vocab_size=1300, max_corpus_chars=20_000, options=options)
    )


@pytest.fixture(scope="module")
def with_pieces() -> Turns:
    """Of a tokenizer of the v2 recipes."""
    return Turns.of(make_tokenizer(v2.SPM_OPTIONS))


@pytest.fixture(scope="module")
def with_words() -> Turns:
    """Of a tokenizer that the original's options made."""
    return Turns.of(Tokenizer.load(FIXTURE / "sentencepiece_model"))


@pytest.fixture(scope="module")
def with_bpe_and_spaces() -> Turns:
    return Turns.of(make_tokenizer(f"--model_type=bpe {KEEP_SPACES}"))


@pytest.fixture(scope="module")
def with_unigram_and_spaces() -> Turns:
    return Turns.of(make_tokenizer(f"--model_type=unigram {KEEP_SPACES}"))


@pytest.fixture(scope="module", params=["with_pieces", "with_words", "with_bpe_and_spaces", "with_unigram_and_spaces"])
def turns(request) -> Turns:
    return request.getfixturevalue(request.param)


def test_pieces_and_what_is_said(with_pieces):
    spm = with_pieces.tokenizer
    user, assistant, system, end = map(spm.control_id, CONTROL_NAMES)
    messages = [{"role": "system", "content": "短く。"}, *said("誰？", "太助です。", "なぜ？")]
    ids, is_answer = with_pieces.encode(messages, add_generation_prompt=True)
    system_part = [system, *spm.encode("短く。"), end]
    question = [user, *spm.encode("誰？"), end, assistant]
    answer = [*spm.encode("太助です。"), end]
    assert ids == [*system_part, *question, *answer, user, *spm.encode("なぜ？"), end, assistant]
    start = len(system_part) + len(question)
    assert [i for i, said in enumerate(is_answer) if said] == list(range(start, start + len(answer)))
    assert (with_pieces.end_ids, with_pieces.stop, with_pieces.exported_end_ids) == ((end,), (), (end,))
    assert with_pieces.answer([*answer, EOS_ID]) == with_pieces.answer(answer[:-1]) == "太助です。"


def test_words_are_text(with_words):
    ids, is_answer = with_words.encode(said("誰？", "太助です。"))
    decoded = with_words.tokenizer.decode
    assert decoded(ids) == "◆ユーザー 誰? ◆ ◆アシスタント 太助です。 ◆"
    answer = [token for token, said in zip(ids, is_answer, strict=True) if said]
    assert decoded(answer) == "太助です。 ◆"
    assert with_words.answer(answer) == "太助です。"
    assert (with_words.end_ids, with_words.stop) == ((), (" ◆", "◆"))
    assert with_words.exported_end_ids == ()  # the tokenizer writes the sign in bytes


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text() | st.lists(st.sampled_from([*TRICKS, "太助"]), max_size=4).map("".join), min_size=1, max_size=4)
)
def test_no_text_is_a_mark(turns, texts):
    """As many marks as turns, whatever is said."""
    ids, _ = turns.encode(said(*texts))
    whole = turns.tokenizer.decode(ids) if turns.sign else ""
    marks = whole.count(turns.sign) if turns.sign else sum((token,) in turns.marks for token in ids)
    assert marks == 2 * len(texts)
    assert EOS_ID not in ids


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("昔太助です。 \n<>|_ー") | st.lists(st.sampled_from(TRICKS), max_size=4).map("".join), max_size=5)
)
def test_template_gives_the_same_ids(turns, fast, texts):
    messages = [{"role": "system", "content": "短く。"}, *said("誰？", *texts)]
    prompt = len(messages) % 2 == 0
    ids, _ = turns.encode(messages, add_generation_prompt=prompt)
    assert encoded(fast, turns, messages, prompt) == [START_ID, *ids]
    if prompt:
        assert turns.encode_rendered(turns.render(messages)) == ids
    parts = [{**m, "content": [{"type": "text", "text": part} for part in (m["content"], "")]} for m in messages]
    assert turns.encode(parts, prompt)[0] == ids
    assert encoded(fast, turns, parts, prompt) == [START_ID, *ids]


@pytest.fixture(scope="module")
def fast(turns):
    return fast_tokenizer.convert(turns.tokenizer)


def encoded(fast, turns: Turns, messages: list[dict], add_generation_prompt: bool) -> list[int]:
    """What transformers does: the template, and no special tokens put around its text."""
    text = template(turns.jinja()).render(
        messages=messages, bos_token=fast.id_to_token(START_ID), add_generation_prompt=add_generation_prompt
    )
    return fast.encode(text, add_special_tokens=False).ids


@functools.cache
def template(text: str) -> jinja2.Template:
    def refuse(message):
        raise ValueError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    return environment.from_string(text)


WRONG = {
    "at least one": [],
    "list of objects": "こんにちは",
    "role that is one of": [{"role": "tool", "content": ""}],
    "'assistant' where 'user'": said("", "")[1:],
    "'user' where 'assistant'": said("") * 2,
    "messages\\[2\\] has the role 'system'": [*said("", ""), {"role": "system", "content": ""}],
    "of the system alone": [{"role": "system", "content": ""}],
    "content must be": [{"role": "user", "content": None}],
    "messages\\[0\\]: content must be a text": [{"role": "user", "content": [{"type": "image_url"}]}],
    "content must be a text, or": [{"role": "user", "content": [{"type": "image_url", "text": "猿"}]}],
    "or a list of parts": [{"role": "user", "content": [{"type": "text", "text": "猿"}, {"type": "text"}]}],
    "parts like": [{"role": "user", "content": {"type": "text", "text": "猿"}}],
    "type': 'text'": [{"role": "user", "content": 3}],
    "messages\\[0\\]=": ["こんにちは"],
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_no_conversation(message, turns, fast):
    """Neither here nor in the template."""
    with pytest.raises(UserError, match=message):
        read_messages(WRONG[message])
    with pytest.raises(ValueError, match=r"There must be|Roles must be|A content must be"):
        encoded(fast, turns, WRONG[message], False)


def test_answers_follow_the_user(turns, fast):
    talk = said("誰？", "太助です。")
    with pytest.raises(UserError, match="must end with one of the user"):
        turns.encode(talk, add_generation_prompt=True)
    with pytest.raises(ValueError, match="must be of the user"):
        encoded(fast, turns, talk, True)


def test_pieces_that_hold_the_sign():
    """No answer has one; that of a turn's end comes first."""
    turns = Turns.of(make_tokenizer("--model_type=bpe --byte_fallback=true", *["◆ユーザー ◆アシスタント ◆"] * 50))
    names = [turns.tokenizer.piece_text(number) for number in turns.exported_end_ids]
    assert names[0] == " ◆"
    assert set(names) == {" ◆", "◆"}
    assert turns.marks[-1] == turns.exported_end_ids[:1]


def test_words_that_others_would_cut_otherwise():
    """Where a piece reaches across a space, a whole text is not cut as its words are."""
    for options in (f"--model_type=bpe {KEEP_SPACES}", "--byte_fallback=true"):
        spm = make_tokenizer(f"--split_by_whitespace=false {options} --character_coverage=1.0", *["太助です。 ◆"] * 100)
        with pytest.raises(UserError, match="cannot hold conversations"):
            Turns.of(spm)


def test_tokenizer_without_signs(tales_tokenizer):
    with pytest.raises(UserError, match="cannot hold conversations"):
        Turns.of(tales_tokenizer)
