"""Models in Python: scores are the original's losses, texts are the command's."""

import numpy as np
import pytest
from conftest import FIXTURE

import transformer_lm
from transformer_lm.data import tokenizer_training
from transformer_lm.errors import UserError
from transformer_lm.generation import language_model
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


def test_without_eos_and_in_any_company(model, original):
    texts = [*original.about["texts"], "", "猫" * 300]
    alone = [model.score([text])[0] for text in texts]
    together = model.score(texts * 30)
    for one, other in zip(alone * 30, together, strict=True):
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


def test_errors(model, tmp_path, monkeypatch):
    monkeypatch.setattr(language_model, "MAX_SCORED_TOKENS", 10)
    with pytest.raises(UserError, match=r"has 3\d tokens; at most 10"):
        model.score(["短い", "長" * 30])
    with pytest.raises(UserError, match="No model"):
        transformer_lm.load(tmp_path)
    for name in ("checkpoint_499999", "sentencepiece_model"):
        (tmp_path / name).write_bytes((FIXTURE / name).read_bytes())
    from transformer_lm.data.corpora import mukashi

    tales = [mukashi.tale(number) for number in range(50)]
    other = tokenizer_training.train([(tales, 1.0)], vocab_size=800, max_corpus_chars=10**6, options="")
    (tmp_path / "sentencepiece_model").write_bytes(other)
    with pytest.raises(UserError, match="do not belong together"):
        transformer_lm.load(tmp_path)
