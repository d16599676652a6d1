"""Generation: the original's greedy texts, truncations by hand, texts that do not depend on their neighbours."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import batch_of, call, init

from transformer_lm import tokenizer
from transformer_lm.checkpoints import loading
from transformer_lm.errors import UserError
from transformer_lm.generation import sampler
from transformer_lm.generation.sampler import SamplingConfig
from transformer_lm.tokenizer import EOS_ID


def generate(config, params, prompts, num_samples=1, seed=0, **sampling):
    settings = SamplingConfig(**{"max_length": 24} | sampling)
    return sampler.generate(config, params, prompts, num_samples=num_samples, sampling=settings, seed=seed)


def without_eos(config, params):
    """Parameters of a network that hardly ever ends a text, so that lengths are known."""
    bias = params["logits"]["bias"].at[EOS_ID].set(-100.0)
    return params | {"logits": params["logits"] | {"bias": bias}}


def with_eos(config, params):
    """Parameters of a network that ends a text after some tokens."""
    bias = params["logits"]["bias"].at[EOS_ID].set(1.5)
    return params | {"logits": params["logits"] | {"bias": bias}}


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"top_k": 1}])
def test_greedy_continuations_of_the_original(original, together, how):
    """Exactly, for all texts in one batch (of unequal lengths) and one by one."""
    loaded = loading.load_model(original.path)
    spm = tokenizer.Tokenizer.load(loaded.tokenizer_path)
    prompts = [spm.encode(text) for text in original.about["texts"]]
    batches = [prompts] if together else [[prompt] for prompt in prompts]
    texts = [t for batch in batches for t in generate(loaded.config, loaded.params, batch, max_length=32, **how)]
    for prompt, [text], expected in zip(prompts, texts, original.reference["greedy"], strict=True):
        end = np.append(np.flatnonzero(expected == EOS_ID), 32)[0]
        assert prompt + text.tokens == expected[:end].tolist()
        assert text.finished == (end < 32)


def test_greedy_is_argmax_of_the_uncached_network(tiny):
    params = without_eos(tiny, init(tiny))
    [[text]] = generate(tiny, params, [[3, 4, 5]], temperature=0.0, max_length=12)
    tokens = [3, 4, 5, *text.tokens]
    logits = call(tiny, params, batch_of([tokens[:-1]], 12))
    np.testing.assert_array_equal(np.argmax(logits[0], axis=-1)[3:], text.tokens)


class TestSample:
    """`sample` against probabilities computed by hand."""

    LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.25, 0.2]))

    def frequencies(self, **settings):
        n = 40_000
        logits = jnp.broadcast_to(jnp.asarray(self.LOGITS, jnp.float32), (n, 5))
        ids = sampler.sample(logits, jax.random.split(jax.random.key(0), n), SamplingConfig(**settings))
        return np.bincount(ids, minlength=5) / n

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({}, [0.05, 0.4, 0.1, 0.25, 0.2]),
            ({"top_k": 2}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
            ({"top_k": 100}, [0.05, 0.4, 0.1, 0.25, 0.2]),
            ({"top_p": 0.6}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),  # 0.4 is not enough, 0.65 is
            ({"top_p": 0.66}, [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),
            ({"top_p": 1e-6}, [0, 1, 0, 0, 0]),
            # 0.4 : 0.25 of the two, squared, and 0.4 ** 2 is 0.72 of their sum
            ({"top_k": 2, "temperature": 0.5, "top_p": 0.7}, [0, 1, 0, 0, 0]),
            ({"temperature": 0.5}, np.array([0.05, 0.4, 0.1, 0.25, 0.2]) ** 2 / 0.275),
            ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
        ],
    )
    def test_frequencies(self, settings, expected):
        found = self.frequencies(**settings)
        np.testing.assert_allclose(found, expected, atol=0.012)
        assert not np.any(found[np.asarray(expected) == 0])


class TestGenerate:
    """With few numbers of prompts and samples, for each of which the sampler is compiled."""

    def test_deterministic_for_a_seed(self, tiny):
        params = without_eos(tiny, init(tiny))
        texts = [generate(tiny, params, [[3]], num_samples=4, seed=seed)[0] for seed in (5, 5, 6)]
        assert texts[0] == texts[1]
        assert texts[0] != texts[2]
        assert len({tuple(text.tokens) for text in texts[0]}) == 4

    def test_a_text_does_not_depend_on_its_neighbours(self, tiny):
        params = with_eos(tiny, init(tiny))
        many = generate(tiny, params, [[3, 4], [5], []], num_samples=6)
        assert generate(tiny, params, [[3, 4]], num_samples=4)[0] == many[0][:4]

    def test_every_prompt_has_numbers_of_its_own(self, tiny):
        """Also of more than 65,536 of them."""
        params, prompts = without_eos(tiny, init(tiny)), [[], [], []]
        sampling = SamplingConfig(temperature=1.0, max_length=24)
        texts = [
            str(sampler.generate(tiny, params, prompts, num_samples=2, sampling=sampling, seed=0, first=first))
            for first in (0, 2**16, 2**17)
        ]
        assert len(set(texts)) == 3

    def test_ends_at_eos(self, tiny):
        params = with_eos(tiny, init(tiny))
        texts = [text for seed in range(10) for text in generate(tiny, params, [[3, 4]], num_samples=4, seed=seed)[0]]
        assert all(EOS_ID not in text.tokens for text in texts)
        assert all(text.finished or len(text.tokens) == 24 - 2 for text in texts)
        assert {text.finished for text in texts} == {True, False}

    def test_length_counts_prompt_and_continuation(self, tiny):
        texts = generate(tiny, without_eos(tiny, init(tiny)), [[3, 4, 5, 6], [7], []], num_samples=6)
        assert [len(text.tokens) for samples in texts for text in samples] == [20] * 6 + [23] * 6 + [24] * 6

    def test_may_be_longer_than_the_rows_of_training(self, tiny):
        config, params = dataclasses.replace(tiny, max_len=8), without_eos(tiny, init(tiny))
        longer = generate(config, params, [[3]], temperature=0.0, max_length=30)
        assert longer == generate(tiny, params, [[3]], temperature=0.0, max_length=30)

    def test_bfloat16(self, tiny):
        config = dataclasses.replace(tiny, dtype="bfloat16")
        [[text]] = generate(config, without_eos(config, init(config)), [[3]])
        assert len(text.tokens) == 23

    def test_prompt_without_room(self, tiny):
        with pytest.raises(UserError, match=r"prompt of 24 tokens .* max_predict_length=24"):
            generate(tiny, init(tiny), [[3], [4] * 24])


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"max_length": 0}])
def test_impossible_values(wrong):
    with pytest.raises(UserError):
        SamplingConfig(**wrong)


def test_prompts_are_padded_to_few_lengths():
    """By less than 16 tokens or at most a quarter: few shapes are compiled, and little is computed in vain."""
    lengths = range(5_000)
    padded = [sampler.padded_length(length) for length in lengths]
    assert all(found > length for length, found in zip(lengths, padded, strict=True))
    assert all(found - length <= max(16, length / 4 + 1) for length, found in zip(lengths, padded, strict=True))
    assert len(set(padded)) < 40
