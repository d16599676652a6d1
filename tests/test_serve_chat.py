"""Conversations with the server by OpenAI's own client: answers, streams, probabilities, errors."""

import dataclasses

import pytest
from conftest import init
from test_serve import NAME, Running, events, serving, tokenizer  # noqa: F401
from test_turns import said, with_pieces, with_words  # noqa: F401

from transformer_lm import models
from transformer_lm.generation.engine import Engine
from transformer_lm.generation.language_model import LanguageModel
from transformer_lm.generation.scheduler import Scheduler
from transformer_lm.tokenizer import EOS_ID

openai = pytest.importorskip("openai", reason="the extra dev's openai is not installed")
CONTEXT = 160
MESSAGES = [{"role": "system", "content": "短く答えます。"}, *said("昔話をお願いします。", "昔々。", "誰が？")]


@pytest.fixture(scope="module", params=["with_pieces", "with_words"])
def model(request) -> LanguageModel:
    turns = request.getfixturevalue(request.param)
    network = models.TransformerConfig(
        vocab_size=turns.tokenizer.vocab_size, emb_dim=16, num_heads=2, num_layers=1, qkv_dim=16, mlp_dim=32,
        max_len=CONTEXT, positions="rope",
    )  # fmt: skip
    return LanguageModel(network, init(network), turns.tokenizer, 0, turns)


@pytest.fixture(scope="module")
def server(model):
    scheduler = Scheduler(Engine(model.network, model.params, slots=4, context=CONTEXT), model.tokenizer)
    running = Running(scheduler, turns=model.turns)
    yield running
    running.stop()


def ask(server, **fields):
    return server.openai.chat.completions.create(**{"model": NAME, "messages": MESSAGES} | fields)


class TestAnswers:
    def test_an_answer_is_the_samplers(self, server, model):
        ids, _ = model.turns.encode(MESSAGES, add_generation_prompt=True)
        answer = ask(server, temperature=0, max_tokens=12, logit_bias={str(EOS_ID): -100})
        expected = model.chat(MESSAGES, temperature=0, max_length=len(ids) + 12)
        assert answer.object == "chat.completion"
        [choice] = answer.choices
        assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
        assert choice.message.content.strip() == expected.strip()
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 12)
        in_parts = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in MESSAGES]
        assert ask(server, messages=in_parts, seed=1).choices == ask(server, seed=1).choices

    def test_a_stream_joined_is_the_whole(self, server):
        asked = {"seed": 3, "n": 2, "max_tokens": 15, "logprobs": True, "top_logprobs": 2}
        whole = ask(server, **asked)
        chunks = list(ask(server, **asked, stream=True, stream_options={"include_usage": True}))
        texts, reasons, tokens = [""] * 2, [None] * 2, [[], []]
        for chunk in chunks[:-1]:
            assert (chunk.object, chunk.usage) == ("chat.completion.chunk", None)
            [choice] = chunk.choices
            texts[choice.index] += choice.delta.content
            tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        assert [chunk.choices[0].delta.role for chunk in chunks[:3]] == ["assistant", "assistant", None]
        assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
        assert texts == [choice.message.content for choice in whole.choices]
        assert len(set(texts)) == 2
        assert reasons == [choice.finish_reason for choice in whole.choices]
        assert tokens == [choice.logprobs.content for choice in whole.choices]
        events(server.post("/v1/chat/completions", messages=MESSAGES, stream=True, max_tokens=2))

    @pytest.mark.parametrize("streamed", [False, True])
    def test_the_end_of_a_turn(self, server, model, streamed):
        """It is no text, but it has been written; so with EOS."""
        for token in (EOS_ID, *model.turns.end_ids):
            fields = {"messages": MESSAGES, "logit_bias": {str(token): 100}, "stream": streamed, "logprobs": True}
            answer = server.post("/v1/chat/completions", **fields)
            choice = (events(answer)[-1] if streamed else answer.json())["choices"][0]
            assert choice["delta" if streamed else "message"]["content"] == ""
            assert choice["finish_reason"] == "stop"
            assert choice["logprobs"]["content"] == []

    def test_the_end_of_a_turn_that_is_a_word(self, server, model):
        """With another sign, that this model writes."""
        if not model.turns.sign:
            pytest.skip("turns are pieces")
        asked = {"temperature": 0, "max_tokens": 40, "logit_bias": {str(EOS_ID): -100}}
        text = ask(server, **asked).choices[0].message.content
        given = "".join(message["content"] for message in MESSAGES)
        sign = next(one for one in text[3:] if one not in given and one.isprintable() and one not in " \ufffd")
        with serving(server.worker.scheduler, turns=dataclasses.replace(model.turns, sign=sign)) as other:
            for streamed in (False, True):
                answer = other.post("/v1/chat/completions", messages=MESSAGES, stream=streamed, **asked)
                choices = [one["choices"][0] for one in (events(answer) if streamed else [answer.json()])]
                said = "".join(one["delta" if streamed else "message"]["content"] for one in choices)
                assert said == text.partition(sign)[0].removesuffix(" ")
                assert choices[-1]["finish_reason"] == "stop"

    def test_log_probs(self, server, model):
        [choice] = ask(
            server, temperature=0, max_tokens=8, logprobs=True, top_logprobs=3, logit_bias={str(EOS_ID): -100}
        ).choices
        found = choice.logprobs.content
        said = bytes(byte for token in found for byte in token.bytes).decode(errors="replace")
        assert said.strip() == choice.message.content.strip()
        for token in found:
            best = [one.logprob for one in token.top_logprobs]
            assert len(best) == 3
            assert best == sorted(best, reverse=True)
            assert token.logprob <= best[0]

    def test_without_a_limit_the_context_is_filled(self, server, model):
        asked = len(model.turns.encode(MESSAGES, add_generation_prompt=True)[0])
        answer = ask(server, extra_body={"ignore_eos": True})
        assert asked + answer.usage.completion_tokens == CONTEXT
        assert answer.choices[0].finish_reason == "length"

    def test_tokens_of_a_conversation(self, server, model):
        found = server.post("/tokenize", messages=MESSAGES).json()["tokens"]
        assert found == model.turns.encode(MESSAGES, add_generation_prompt=True)[0]
        assert server.post("/tokenize").status_code == 400


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "must be a list"),
        ({"messages": MESSAGES[:3]}, "messages", "must end with one of the user"),
        ({"messages": MESSAGES[2:]}, "messages", "the role 'assistant' where 'user' must be"),
        ({"messages": said("a") * 2}, "messages", "messages[1]"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages", "must have a role"),
        ({"messages": [{"role": "user"}]}, "messages", "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages", "messages[0].name"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "messages[0].content"),
        ({"messages": said("昔" * CONTEXT)}, None, f"more than the context of {CONTEXT}"),
        ({"tools": []}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"echo": True}, "echo", "not supported"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": 2}, "logprobs", "boolean"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "send one"),
        ({"max_tokens": 0}, "max_tokens", "greater"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    ],
)
def test_impossible_fields_are_named(server, fields, param, words):
    answer = server.post("/v1/chat/completions", **{"messages": MESSAGES} | fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
