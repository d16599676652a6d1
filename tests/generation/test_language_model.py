"""Models in Python: scores are the original's losses, texts are the command's."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import FIXTURE, init

import transformer_lm
from transformer_lm import attention, logits
from transformer_lm.data import tokenizer_training
from transformer_lm.errors import UserError
from transformer_lm.generation import language_model, sampler
from transformer_lm.tokenizer import EOS_ID


@pytest.fixture(scope="module")
def model():
    return transformer_lm.load(FIXTURE)


def test_scores_are_the_originals_losses(original):
    model = transformer_lm.load(original.path)
    scores = model.score(original.about["texts"], with_eos=True)
    for score, tokens, losses in zip(
        scores, original.reference["tokens"], original.reference["token_loss"], strict=True
    ):
        real = tokens > 0
        assert score.tokens == tokens[real].tolist()
        assert score.tokens[-1] == EOS_ID
        np.testing.assert_allclose(-score.token_log_probs, losses[real], atol=1e-4, rtol=0)
        assert score.log_prob == pytest.approx(-losses[real].sum(), abs=1e-3)


def test_without_eos_and_in_any_company(model, original, monkeypatch):
    monkeypatch.setattr(language_model, "BATCH_TOKENS", 640)  # several batches
    texts = [*original.about["texts"], "", "猫" * 300]
    alone = [model.score([text])[0] for text in texts]
    together = model.score(texts * 8)
    for one, other in zip(alone * 8, together, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.token_log_probs, other.token_log_probs, atol=1e-4)
    whole = model.score(texts, with_eos=True)
    for one, other in zip(alone, whole, strict=True):
        np.testing.assert_allclose(one.token_log_probs, other.token_log_probs[:-1], atol=1e-4)
    assert together[5].log_prob == 0.0


def test_generation_is_the_originals(model, original):
    prompts = original.about["texts"]
    written = model.generate(prompts, temperature=0, max_length=32)
    assert [text["prompt"] for text in written] == prompts
    for text, tokens in zip(written, original.reference["greedy"], strict=True):
        assert text["text"] == model.tokenizer.decode(tokens)
    one, two = model.generate("夏目漱石は、", num_samples=2, max_length=20)
    assert one["text"] != two["text"]
    assert [one, two] == model.generate(["夏目漱石は、"], num_samples=2, max_length=20)


def test_many_prompts_are_written_in_batches(model, monkeypatch):
    """As large as there is room for caches; the texts are those of one batch, and come when they are written."""
    prompts = ["昔々", "吾輩は猫である。", "", "桃", "むかし、おじいさんが", "猿"]
    whole = model.generate(prompts, num_samples=3, max_length=24, temperature=1.0, top_k=0)
    sizes, generate = [], sampler.generate
    monkeypatch.setattr(
        sampler, "generate", lambda *args, **named: sizes.append(len(args[2])) or generate(*args, **named)
    )
    settings = sampler.SamplingConfig(temperature=1.0, max_length=24)
    room = language_model._prompts_at_once(model.network, 10, 3, settings)
    monkeypatch.setattr(language_model, "CACHE_BYTES", 2 * language_model.CACHE_BYTES // room)
    texts = model.continue_texts(prompts, settings, seed=0, num_samples=3)
    assert sizes == []
    assert next(texts) == whole[0]
    assert sizes == [2]
    assert list(texts) == whole[1:]
    assert sizes == [2, 2, 2]


def test_errors(model, tmp_path, monkeypatch):
    monkeypatch.setattr(language_model, "MAX_SCORED_TOKENS", 10)
    with pytest.raises(UserError, match=r"has 3\d tokens; at most 10"):
        model.score(["短い", "長" * 30])
    with pytest.raises(UserError, match="No model"):
        transformer_lm.load(tmp_path)
    with pytest.raises(UserError, match="None is no address of a model"):
        transformer_lm.load(None)
    with pytest.raises(UserError, match="hf://OWNER/NAME"):
        transformer_lm.load("https://huggingface.co/owner/name")
    for name in ("checkpoint_499999", "sentencepiece_model"):
        (tmp_path / name).write_bytes((FIXTURE / name).read_bytes())
    from transformer_lm.data.corpora import mukashi

    tales = [mukashi.tale(number) for number in range(50)]
    other = tokenizer_training.train([(tales, 1.0)], vocab_size=800, max_corpus_chars=10**6, options="")
    (tmp_path / "sentencepiece_model").write_bytes(other)
    with pytest.raises(UserError, match="do not belong together"):
        transformer_lm.load(tmp_path)


def test_long_texts_are_scored_in_bounded_memory(tiny, monkeypatch):
    """In blocks as at once, alone and beside a shorter one, and the array of all scores is never there."""
    length, rng = 2080, np.random.default_rng(0)
    network = dataclasses.replace(tiny, max_len=length)
    inputs = rng.integers(3, 50, (2, length)).astype(np.int32)
    segments = np.ones_like(inputs)
    segments[1, 700:] = 0
    arguments = network, init(network), inputs, np.roll(inputs, -1), segments
    scores, bytes_used = {}, {}
    for blocks in (True, False):
        if blocks:
            monkeypatch.setattr(logits, "AT_ONCE", 20 * 2 * network.vocab_size)
        else:
            monkeypatch.undo()
            monkeypatch.setattr(attention, "LONG", length)
        traced_anew = jax.jit(
            lambda *arguments: language_model._score_targets.__wrapped__(*arguments), static_argnums=0
        )
        compiled = traced_anew.lower(*arguments).compile()
        bytes_used[blocks] = compiled.memory_analysis().temp_size_in_bytes
        scores[blocks] = compiled(*arguments[1:])
    for found, expected in zip(scores[True], scores[False], strict=True):
        np.testing.assert_allclose(found[segments > 0], expected[segments > 0], atol=1e-5)
    all_scores = 4 * 2 * network.num_heads * length**2
    assert bytes_used[True] < all_scores < bytes_used[False]


class TestWhatPeoplePass:
    def test_nothing(self, model):
        assert model.generate([]) == model.generate("昔々", num_samples=0) == model.score([]) == []

    def test_texts_in_anything(self, model):
        texts = ["昔々", "吾輩は"]
        expected = model.generate(texts, max_length=16)
        assert model.generate(tuple(texts), max_length=16) == expected
        assert model.generate((text for text in texts), max_length=16) == expected
        [score] = model.score("昔々あるところに")
        assert score.log_prob == model.score(["昔々あるところに"])[0].log_prob

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"temperature": float("nan")}, "temperature=nan must be finite"),
            ({"temperature": -1}, "temperature=-1 must be at least 0"),
            ({"temperature": "hot"}, "temperature='hot' must be a number"),
            ({"top_k": 1.5}, "top_k=1.5 must be a whole number"),
            ({"top_k": -1}, "top_k=-1 must be at least 0"),
            ({"top_p": float("inf")}, "top_p=inf must be finite"),
            ({"max_length": 2**40}, "max_length=1099511627776 must be at most"),
            ({"max_length": None}, "max_length=None must be a whole number"),
            ({"seed": -1}, "seed=-1 must be at least 0"),
            ({"seed": 2**40}, "seed=1099511627776 must be at most"),
            ({"seed": True}, "seed=True must be a whole number"),
            ({"num_samples": -1}, "num_samples=-1 must be at least 0"),
            ({"num_samples": 10**9}, "num_samples=1000000000 must be at most"),
        ],
    )
    def test_impossible_settings(self, model, settings, words):
        with pytest.raises(UserError, match=words):
            model.generate("昔々", **settings)

    def test_numpys_numbers_and_large_ones(self, model):
        expected = model.generate("昔々", temperature=0.5, top_k=3, max_length=12)
        found = model.generate("昔々", temperature=np.float32(0.5), top_k=np.int64(3), max_length=np.int32(12))
        assert found == expected
        logits, keys = np.random.default_rng(0).normal(size=(50, 20)), jax.random.split(jax.random.key(0), 50)
        for one, other in [({"top_k": 2**31 - 1}, {"top_k": 0}), ({"temperature": 1e-300}, {"temperature": 0})]:
            chosen = [sampler.sample(logits, keys, sampler.SamplingConfig(**settings)) for settings in (one, other)]
            np.testing.assert_array_equal(*chosen)

    @pytest.mark.parametrize("texts", [3, None, [3], [b"bytes"], {"a": 1}.values()])
    def test_no_texts(self, model, texts):
        with pytest.raises(UserError, match="must be a text"):
            model.generate(texts)
        with pytest.raises(UserError, match="must be a text"):
            model.score(texts)

    @pytest.mark.parametrize("dtype", ["bf16", "float16", None, np.float32])
    def test_dtypes(self, dtype):
        with pytest.raises(UserError, match=r"^dtype="):
            transformer_lm.load(FIXTURE, dtype=dtype)


def test_a_prompt_without_room_is_named(model):
    sampling = sampler.SamplingConfig(max_length=5)
    with pytest.raises(UserError, match=r"'夏目漱石は、' of \d+ tokens leaves no room to write: max_predict_length=5"):
        language_model.check_prompts(model.tokenizer, ["猫", "夏目漱石は、"], sampling)
    assert language_model.check_prompts(model.tokenizer, ["猫"], sampling) == [model.tokenizer.encode("猫")]
