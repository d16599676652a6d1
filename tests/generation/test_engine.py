"""The engine: each text alone and in any company the same, bit for bit; settings against sums by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FIXTURE, batch_of, call, init

from transformer_lm import attention, models
from transformer_lm.errors import UserError
from transformer_lm.generation import choosing
from transformer_lm.generation import engine as engines
from transformer_lm.generation.choosing import Settings
from transformer_lm.generation.engine import CHUNK, Engine
from transformer_lm.generation.scheduler import Request, Scheduler
from transformer_lm.tokenizer import EOS_ID, Tokenizer

SLOTS = 4
MODERN = {"norm": "rms", "positions": "rope", "qk_norm": True, "mlp": "swiglu", "num_kv_heads": 1, "use_bias": False}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(FIXTURE / "sentencepiece_model")


@pytest.fixture(scope="module")
def network(tokenizer) -> models.TransformerConfig:
    return models.TransformerConfig(
        vocab_size=tokenizer.vocab_size, emb_dim=16, num_heads=2, num_layers=2, qkv_dim=16, mlp_dim=32, max_len=32,
        **MODERN,
    )  # fmt: skip


@pytest.fixture(scope="module")
def engine(network) -> Engine:
    return Engine(network, init(network), slots=SLOTS, context=4 * CHUNK)


def write(scheduler: Scheduler, requests: list[Request], late: int = 0) -> list[tuple[str, list, str]]:
    """Text, tokens and reason of each; each after the first comes `late` steps after the one before it."""
    parts, jobs = {}, []
    for request in requests:
        jobs.append(scheduler.submit(request))
        for _ in range(late):
            for job, part in scheduler.advance():
                parts.setdefault(job, []).append(part)
    while not scheduler.is_idle:
        for job, part in scheduler.advance():
            parts.setdefault(job, []).append(part)
    return [
        (
            "".join(part.text for part in parts[job]),
            [token for part in parts[job] for token in part.tokens],
            parts[job][-1].finish_reason,
        )
        for job in jobs
    ]


def requests_of_all_kinds(vocab_size: int) -> list[Request]:
    rng = np.random.default_rng(0)
    kinds = [
        Settings(seed=1),
        Settings(temperature=0.7, top_k=20, seed=2, alternatives=3),
        Settings(temperature=0.0, repetition_penalty=1.3),
        Settings(top_p=0.8, min_p=0.01, frequency_penalty=0.5, seed=2**40),
        Settings(seed=1, presence_penalty=-1.0, logit_bias={EOS_ID: 3.0, 7: 2.0}),
        Settings(temperature=2.0, top_p=0.5, top_k=100, seed=3),
    ]
    lengths = [3, 14, 0, 30, 16, 1]
    return [
        Request(rng.integers(3, vocab_size, length).tolist(), kind, max_tokens=12, number=number)
        for number, (kind, length) in enumerate(zip(kinds, lengths, strict=True))
    ]


def test_attention_to_what_is_filled_is_attention():
    """And its bits do not depend on how many more slots others have filled."""
    rng = np.random.default_rng(0)
    block, slots = attention.SLOT_BLOCK, 3 * attention.SLOT_BLOCK
    query, key, value = (rng.normal(size=(3, heads, n, 8)) for heads, n in ((4, 1), (2, slots), (2, slots)))
    query, key, value = (x.astype(np.float32) for x in (query, key, value))
    mask = np.arange(slots) < np.array([1, block - 5, block + 7])[:, None, None]  # [B, 1, S]
    found = [jax.jit(attention.attend_to_filled)(query, key, value, mask, n) for n in (block + 7, 2 * block, slots)]
    np.testing.assert_allclose(found[0], attention.attend(query, key, value, mask), atol=1e-6)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    alone = jax.jit(attention.attend_to_filled)(query, key, value, mask, block)
    np.testing.assert_array_equal(alone[:2], found[0][:2])


class TestCompany:
    @pytest.mark.parametrize("late", [0, 2])
    def test_a_text_is_the_same_alone_and_in_any_company(self, engine, tokenizer, late):
        """Bit for bit, log probabilities too, whoever stands in the other slots, came before or comes later."""
        requests = requests_of_all_kinds(tokenizer.vocab_size)
        alone = []
        for request in requests:
            engine.reset()
            alone += write(Scheduler(engine, tokenizer), [request])
        engine.reset()
        scheduler = Scheduler(engine, tokenizer)
        assert write(scheduler, requests, late) == alone
        assert write(scheduler, requests[::-1], late)[::-1] == alone  # after others, in other slots

    def test_seeds_and_numbers(self, engine, tokenizer):
        scheduler = Scheduler(engine, tokenizer)
        kinds = [(1, 0), (1, 0), (1, 1), (2, 0), (1 + 2**32, 0)]
        found = write(scheduler, [Request([5, 6], Settings(seed=seed), 12, number=number) for seed, number in kinds])
        assert found[0] == found[1]
        assert len({text for text, _, _ in found}) == 4

    def test_changing_a_setting_compiles_nothing(self, engine, tokenizer):
        scheduler = Scheduler(engine, tokenizer)
        requests = requests_of_all_kinds(tokenizer.vocab_size)
        write(scheduler, requests[1:2])
        compiled = engines._choose, engines._extend, engines._begin, engines._put_logits
        before = [function._cache_size() for function in compiled]
        write(scheduler, requests)
        assert before == [function._cache_size() for function in compiled]


class TestPrompts:
    """Prompts of more than a chunk, and what they have in common."""

    @staticmethod
    def requests(vocab_size: int) -> list[Request]:
        first, other = np.random.default_rng(0).integers(3, vocab_size, (2, 2 * CHUNK + 20)).tolist()
        prompts = [first, first[: CHUNK + 3] + other[:30], first, [*first, *other[:9]], first[: 2 * CHUNK], other]
        prompts += [first[:CHUNK], first[: CHUNK - 1], first, other[:5]]
        settings = [Settings(seed=5, alternatives=2), Settings(seed=5, top_k=30)]
        return [Request(prompt, settings[n % 2], 6, number=n, echo=n == 8) for n, prompt in enumerate(prompts)]

    @pytest.mark.parametrize("late", [0, 1, 5])
    def test_what_is_taken_over_is_what_would_be_read(self, engine, tokenizer, monkeypatch, late):
        """Bit for bit, from texts that have ended and from those that are at work, read whole or not."""
        requests, alone, counts = self.requests(tokenizer.vocab_size), [], []
        for request in requests:
            engine.reset()
            alone += write(Scheduler(engine, tokenizer), [request])
        read = engine.read
        monkeypatch.setattr(engine, "read", lambda slot: counts.append(read(slot)) or counts[-1])
        for order in (1, -1):
            engine.reset()
            counts.clear()
            scheduler = Scheduler(engine, tokenizer)
            assert write(scheduler, requests[::order], late)[::order] == alone
            assert sum(counts) < 0.7 * sum(len(request.prompt) for request in requests)
            counts.clear()
            assert write(scheduler, requests[:3]) == alone[:3]
            assert sum(counts) < CHUNK

    def test_scores_do_not_rest_on_what_others_read(self, engine, tokenizer):
        """Nor do texts behind a scored prompt differ from those behind one that is not."""
        prompt = self.requests(tokenizer.vocab_size)[0].prompt
        plain = Request(prompt, Settings(seed=3), 4)
        scored = dataclasses.replace(plain, echo=True, log_probs=True)
        found = []
        for requests in ([plain, scored], [scored, plain]):
            engine.reset()
            texts = [tokens for _, tokens, _ in write(Scheduler(engine, tokenizer), requests)]
            found += sorted(texts, key=len)
        assert found[0] == found[2]
        assert found[1] == found[3]
        ids = [[(token.id, token.log_prob) for token in text] for text in found]
        assert ids[1][len(prompt) :] == ids[0]

    def test_penalties_count_what_is_written_alone(self, engine, tokenizer):
        """And not what steps choose in a slot whose prompt is still being read, chunk by chunk."""
        endless = {"logit_bias": {EOS_ID: -100.0}}
        prompt = np.random.default_rng(0).integers(3, tokenizer.vocab_size, 3 * CHUNK + 8).tolist()
        penalized = Request(prompt, Settings(temperature=0.0, frequency_penalty=2.0, **endless), 8)
        engine.reset()
        alone = write(Scheduler(engine, tokenizer), [penalized])
        engine.reset()
        other = Request([5], Settings(**endless), 40)
        assert write(Scheduler(engine, tokenizer), [other, penalized], late=1)[1:] == alone

    def test_a_long_prompt_holds_nobody_up(self, engine, tokenizer):
        """Others write a token at each step, and a short prompt does not wait for the end of a long one."""
        engine.reset()
        scheduler = Scheduler(engine, tokenizer)
        endless = Settings(logit_bias={EOS_ID: -100.0})
        writing = scheduler.submit(Request([5], endless, 100))
        scheduler.advance()
        long = scheduler.submit(Request([6, 7] * 100, endless, 10))
        short = scheduler.submit(Request([8] * 5, endless, 10))
        begun = {}
        for number in range(12):
            parts = scheduler.advance()
            assert writing in [job for job, _ in parts]
            for job, _ in parts:
                begun.setdefault(job, number)
        assert begun[short] <= 2
        assert begun[short] < begun[long] < 8
        for job in (writing, long, short):
            scheduler.cancel(job)
        unread = scheduler.submit(Request([9, 10] * 100, endless, 10))
        scheduler.advance()
        scheduler.cancel(unread)
        assert scheduler.is_idle
        [(_, tokens, _)] = write(scheduler, [Request([9, 10] * 100, endless, 10)])
        engine.reset()
        assert write(scheduler, [Request([9, 10] * 100, endless, 10)])[0][1] == tokens


class TestNetwork:
    @pytest.mark.parametrize(("kind", "context"), [({}, 2 * CHUNK), (MODERN, 32)])
    def test_greedy_is_argmax_of_the_uncached_network(self, tiny, kind, context):
        """And its log probabilities are that network's, in slots that others had before."""
        config = dataclasses.replace(tiny, max_len=context, **kind)
        params = init(config)
        engine = Engine(config, params, slots=2, context=context)
        for slot, other in ((0, [9] * 20), (1, [8] * 30)):
            engine.prefill(slot, other, Settings())
        engine.step()
        prompt = [3, 4, 5]
        engine.prefill(1, prompt, Settings(temperature=0.0, alternatives=2, logit_bias={EOS_ID: -100.0}))
        choices = [engine.step() for _ in range(12)]
        tokens = prompt + [int(choice.tokens[1]) for choice in choices]
        log_probs = jax.nn.log_softmax(call(config, params, batch_of([tokens[:-1]], context)))[0, 3 : len(tokens)]
        for found, expected in zip(choices, log_probs, strict=True):
            np.testing.assert_allclose(found.log_probs[1], expected[found.tokens[1]], atol=1e-5)
            np.testing.assert_allclose(found.alternative_log_probs[1, :2], np.sort(expected)[-1:-3:-1], atol=1e-5)
            assert found.tokens[1] == np.argmax(np.delete(expected, EOS_ID)) + (
                np.argmax(np.delete(expected, EOS_ID)) >= EOS_ID
            )

    def test_scores_of_a_prompt(self, tiny):
        """Of prompts shorter and longer than a chunk, whatever has been read before."""
        config = dataclasses.replace(tiny, max_len=2 * CHUNK)
        params = init(config)
        engine = Engine(config, params, slots=2, context=2 * CHUNK)
        prompt = np.random.default_rng(0).integers(3, 50, CHUNK + 22).tolist()
        expected = jax.nn.log_softmax(call(config, params, batch_of([prompt], 2 * CHUNK)))[0]
        for given, skip in ((prompt[:22], 0), ([0, *prompt[:22]], 1), (prompt, 0), ([0, *prompt], 1), ([], 0)):
            engine.begin(0, given, Settings(), has_start=skip == 1, scored=True)
            while not engine.is_read(0):
                engine.read(0)
            scores, size = engine.scores(0), len(given) - skip
            assert scores.tokens.tolist() == given
            assert np.isnan(scores.log_probs[:skip]).all()
            np.testing.assert_allclose(scores.log_probs[skip:], expected[np.arange(size), prompt[:size]], atol=1e-5)
            np.testing.assert_array_equal(scores.alternatives[skip:, 0], expected[:size].argmax(-1))

    def test_a_text_that_begins_with_an_unknown_piece(self, network, engine, tokenizer):
        """Whose id is that of a text's start: it has both."""
        prompt, params = [0, 455, 907], init(network)
        for has_start, tokens in ((False, prompt), (True, prompt[1:])):
            request = Request(prompt, Settings(temperature=0.0), max_tokens=1, has_start=has_start)
            [(_, [written], _)] = write(Scheduler(engine, tokenizer), [request])
            expected = jax.nn.log_softmax(call(network, params, batch_of([[*tokens, 5]], 8))[0, len(tokens)])
            assert written.id == np.argmax(expected)
            assert written.log_prob == pytest.approx(float(expected[written.id]), abs=1e-5)

    def test_a_full_context(self, engine, tokenizer):
        n = engine.context - 18
        [(_, tokens, reason)] = write(
            Scheduler(engine, tokenizer), [Request([5] * n, Settings(logit_bias={EOS_ID: -100.0}), 18)]
        )
        assert (len(tokens), reason) == (18, "length")
        with pytest.raises(UserError, match=rf"{n} tokens, and max_tokens=19: .* context of {engine.context}"):
            Scheduler(engine, tokenizer).submit(Request([5] * n, max_tokens=19))
        with pytest.raises(UserError, match="prompt has the token 10000000"):
            engine.prefill(0, [10_000_000], Settings())
        with pytest.raises(UserError, match="logit_bias has the token 10000000"):
            engine.prefill(0, [5], Settings(logit_bias={10_000_000: 1}))


class TestSettings:
    """`choose` and `change` against probabilities by hand."""

    P = np.array([0.05, 0.4, 0.1, 0.25, 0.2])

    def frequencies(self, **settings):
        n = 20_000
        table = {name: jnp.asarray(np.repeat(values, n, axis=0)) for name, values in choosing.table_of(1).items()}
        table |= {name: jnp.full(n, value, table[name].dtype) for name, value in settings.items()}
        logits = jnp.broadcast_to(jnp.log(jnp.asarray(self.P, jnp.float32)) + 3, (n, 5))
        ids = jax.jit(choosing.choose)(logits, jax.random.split(jax.random.key(0), n), table)
        return np.bincount(ids, minlength=5) / n

    @pytest.mark.parametrize(
        ("settings", "kept"),
        [
            ({}, [0, 1, 2, 3, 4]),
            ({"top_k": 2}, [1, 3]),
            ({"top_k": 100}, [0, 1, 2, 3, 4]),
            ({"top_p": 0.6}, [1, 3]),  # 0.4 is not enough, 0.65 is
            ({"top_p": 0.66}, [1, 3, 4]),
            ({"top_p": 1e-6}, [1]),
            ({"top_p": 1e-300}, [1]),
            ({"min_p": 0.4}, [1, 3, 4]),  # 0.16 and more
            ({"min_p": 1.0}, [1]),
            ({"top_k": 3, "top_p": 0.77}, [1, 3, 4]),  # 0.65 of 0.85 is 0.76
            ({"top_k": 3, "top_p": 0.75}, [1, 3]),
            ({"temperature": 0.0}, [1]),
            ({"temperature": 1e-9, "top_p": 0.5}, [1]),
        ],
    )
    def test_what_is_kept(self, settings, kept):
        expected = np.where(np.isin(np.arange(5), kept), self.P, 0)
        found = self.frequencies(**settings)
        np.testing.assert_allclose(found, expected / expected.sum(), atol=0.015)
        assert not np.any(found[expected == 0])

    def test_temperature(self):
        np.testing.assert_allclose(self.frequencies(temperature=0.5), self.P**2 / np.sum(self.P**2), atol=0.015)

    def test_penalties_and_biases(self):
        table = {name: jnp.asarray(values) for name, values in choosing.table_of(1).items()}
        changes = {"repetition_penalty": 2.0, "frequency_penalty": 0.5, "presence_penalty": 0.25}
        table |= {name: jnp.full(1, value, jnp.float32) for name, value in changes.items()}
        logits, bias = jnp.array([[1.0, -1.0, 1.0, 1.0]]), jnp.array([[0.0, 0.0, 0.0, 7.0]])
        counts, prompted = jnp.array([[3, 0, 0, 0]]), jnp.array([[False, True, False, False]])
        found = choosing.change(logits, bias, counts, prompted, table)
        np.testing.assert_allclose(found, [[0.5 - 3 * 0.5 - 0.25, -2.0, 1.0, 8.0]])

    @pytest.mark.parametrize(
        "wrong",
        [
            {"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"min_p": 1.5}, {"repetition_penalty": 0.0},
            {"frequency_penalty": 3.0}, {"seed": -1}, {"alternatives": 21}, {"logit_bias": {1: 101.0}},
            {"logit_bias": {"a": 1.0}}, {"temperature": float("nan")},
        ],
    )  # fmt: skip
    def test_impossible_values(self, wrong):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Settings(**wrong)


class TestScheduler:
    def test_echo(self, engine, tokenizer):
        """The prompt's text and tokens come first, with scores where they are asked for."""
        prompt = tokenizer.encode("吾輩は猫である。")
        plain, scored, empty = write(
            Scheduler(engine, tokenizer),
            [
                Request(prompt, Settings(seed=4), 5, echo=True),
                Request(prompt, Settings(seed=4, alternatives=2), 5, echo=True, log_probs=True),
                Request(prompt, Settings(alternatives=1), 0, echo=True, log_probs=True),
            ],
        )
        assert plain[0] == scored[0]
        ids = [token.id for token in scored[1]]
        assert ids[: len(prompt)] == prompt
        assert scored[0] == tokenizer.decode(ids)
        assert empty[0] == tokenizer.decode(prompt)
        assert empty[2] == "length"
        offsets = [len(tokenizer.decode(ids[:place]).rstrip("\ufffd")) for place in range(len(ids))]
        assert [token.offset for token in scored[1]] == offsets
        for token in scored[1]:
            assert len(token.alternatives) == 2
            assert token.alternatives[0][1] >= token.log_prob

    def test_stop_strings_cut_tokens_too(self, engine, tokenizer):
        prompt = tokenizer.encode("昔々")
        request = Request(prompt, Settings(temperature=0.0, logit_bias={EOS_ID: -100.0}), 16)
        [(text, tokens, _)] = write(Scheduler(engine, tokenizer), [request])
        stop = text[len(text) // 2 :][:2]
        [(cut, kept, reason)] = write(Scheduler(engine, tokenizer), [dataclasses.replace(request, stop=(stop,))])
        assert (cut, reason) == (text[: text.index(stop)], "stop")
        assert kept == [token for token in tokens if token.offset < len(cut)]

    def test_cancelled_ones_make_room(self, engine, tokenizer):
        scheduler = Scheduler(engine, tokenizer)
        endless = Request([5], Settings(logit_bias={EOS_ID: -100.0}), 40)
        jobs = [scheduler.submit(endless) for _ in range(SLOTS + 2)]
        scheduler.advance()
        for job in jobs[1:]:
            scheduler.cancel(job)
        assert {job for job, _ in scheduler.advance()} == {jobs[0]}
        scheduler.cancel(jobs[0])
        assert scheduler.is_idle
