"""The server, asked by OpenAI's own client and by hand: answers, streams, errors, load, and its end."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from conftest import FIXTURE, batch_of, call, init, one_line_error, run
from real_datasets import make_hub_cache

from transformer_lm import models
from transformer_lm.generation.engine import Engine
from transformer_lm.generation.scheduler import Scheduler
from transformer_lm.tokenizer import EOS_ID, Tokenizer

httpx = pytest.importorskip("httpx2", reason="the extra serve is not installed")
openai = pytest.importorskip("openai", reason="the extra dev's openai is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="the extra serve is not installed")

import pydantic  # noqa: E402
from processes import Fork, run_fork  # noqa: E402

from transformer_lm.serving import completions, schema  # noqa: E402
from transformer_lm.serving.app import ServerConfig, make_app  # noqa: E402
from transformer_lm.serving.worker import Worker  # noqa: E402

SLOTS, LIMIT, CONTEXT = 4, 80, 64
NAME = "tiny"
LONG = {"max_tokens": 60, "logit_bias": {str(EOS_ID): -100}}  # a text of so many tokens


class Running:
    """A server in a thread of this process, on a free port."""

    def __init__(self, scheduler: Scheduler, limit: int = LIMIT, **config):
        self.worker = Worker(scheduler, limit)
        app = make_app(scheduler, self.worker, ServerConfig(**{"name": NAME} | config))
        self._server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._server.run, args=([listener],))
        self._thread.start()
        self.http = httpx.Client(base_url=self.url, timeout=120)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def stop(self):
        self.openai.close()
        self.http.close()
        self._server.should_exit = True
        self._thread.join()
        self.worker.stop()

    def post(self, path: str = "/v1/completions", **body):
        return self.http.post(path, json=body)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(FIXTURE / "sentencepiece_model")


@pytest.fixture(scope="module")
def network(tokenizer) -> models.TransformerConfig:
    return models.TransformerConfig(
        vocab_size=tokenizer.vocab_size, emb_dim=16, num_heads=2, num_layers=1, qkv_dim=16, mlp_dim=32, max_len=CONTEXT
    )


@pytest.fixture(scope="module")
def scheduler(network, tokenizer) -> Scheduler:
    return Scheduler(Engine(network, init(network), slots=SLOTS, context=CONTEXT), tokenizer)


@pytest.fixture(scope="module")
def server(scheduler):
    running = Running(scheduler)
    yield running
    running.stop()


@contextlib.contextmanager
def serving(scheduler, **options):
    """Another server for the same slots, which the module's own does not use meanwhile."""
    running = Running(scheduler, **options)
    try:
        yield running
    finally:
        running.stop()


def events(response) -> list[dict]:
    """The data of a stream of server-sent events, which must end as OpenAI's do."""
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


class TestCompletions:
    def test_a_stream_joined_is_the_whole(self, server):
        asked = {"model": NAME, "prompt": "吾輩は", "seed": 3, "n": 3, "max_tokens": 20, "extra_body": {"top_k": 50}}
        whole = server.openai.completions.create(**asked)
        stream = server.openai.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        texts, reasons = [""] * 3, [None] * 3
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                reasons[choice.index] = choice.finish_reason or reasons[choice.index]
                assert chunk.usage is None
        assert texts == [choice.text for choice in whole.choices]
        assert len(set(texts)) == 3
        assert reasons == [choice.finish_reason for choice in whole.choices]
        assert chunk.usage == whole.usage
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        assert whole.usage.completion_tokens <= 60

    def test_log_probs_and_echo_are_the_networks(self, server, network, tokenizer):
        prompt = tokenizer.encode("昔々あるところに")
        found = server.openai.completions.create(
            model=NAME, prompt="昔々あるところに", echo=True, logprobs=2, max_tokens=5, temperature=0,
            logit_bias={str(EOS_ID): -100}, extra_body={"return_token_ids": True},
        )  # fmt: skip
        [choice] = found.choices
        ids = choice.token_ids
        assert ids[: len(prompt)] == prompt
        assert choice.text == tokenizer.decode(ids)
        expected = jax.nn.log_softmax(call(network, init(network), batch_of([ids], CONTEXT)))[0]
        np.testing.assert_allclose(choice.logprobs.token_logprobs, expected[np.arange(len(ids)), ids], atol=1e-4)
        for top, best, token, row in zip(
            choice.logprobs.top_logprobs, choice.logprobs.alternatives, ids, expected, strict=False
        ):
            np.testing.assert_allclose(sorted(top.values())[-2:], np.sort(row)[-2:], atol=1e-4)
            assert best[0]["id"] == np.argmax(row)
            assert tokenizer.piece_text(token) in top
        assert found.usage.completion_tokens == 5
        bare = server.openai.completions.create(
            model=NAME, prompt="昔々あるところに", echo=True, logprobs=0, max_tokens=0
        )
        np.testing.assert_allclose(
            bare.choices[0].logprobs.token_logprobs, choice.logprobs.token_logprobs[: len(prompt)]
        )
        assert {len(top) for top in bare.choices[0].logprobs.top_logprobs} == {1}

    def test_prompts_in_all_forms(self, server, tokenizer):
        texts = ["昔々", "吾輩は猫である。"]
        ids = [tokenizer.encode(text) for text in texts]
        asked = {"model": NAME, "temperature": 0, "max_tokens": 6}
        answers = [server.openai.completions.create(prompt=prompt, **asked) for prompt in (texts, ids)]
        answers += [server.openai.completions.create(prompt=prompt, **asked) for prompt in texts]
        found = [[choice.text for choice in answer.choices] for answer in answers]
        assert found[0] == found[1] == found[2] + found[3]
        assert answers[0].usage.prompt_tokens == sum(map(len, ids))

    def test_stop_strings(self, server):
        asked = {"prompt": "昔々", "temperature": 0, **LONG, "max_tokens": 40}
        text = server.post(**asked).json()["choices"][0]["text"]
        stop = text[5:8]
        for streamed in (False, True):
            answer = server.post(**asked, stop=["ない", stop], stream=streamed)
            choices = [event["choices"][0] for event in events(answer)] if streamed else answer.json()["choices"]
            assert "".join(choice["text"] for choice in choices) == text[: text.index(stop)]
            assert choices[-1]["finish_reason"] == "stop"

    def test_benchmarks_ignore_the_end(self, server):
        answer = server.post(prompt="昔", max_tokens=30, ignore_eos=True, logit_bias={str(EOS_ID): 5}).json()
        assert answer["usage"]["completion_tokens"] == 30
        assert answer["choices"][0]["finish_reason"] == "length"


class TestOthers:
    def test_models_health_metrics(self, server):
        [model] = server.openai.models.list().data
        assert (model.id, model.max_model_len) == (NAME, CONTEXT)
        assert server.openai.models.retrieve(NAME) == model
        with pytest.raises(openai.NotFoundError, match="The model 'other/one' does not exist") as caught:
            server.openai.models.retrieve("other/one")
        assert caught.value.code == "model_not_found"
        assert server.http.get("/health").json() == {"status": "ok"}
        server.post(prompt="昔", max_tokens=3)
        metrics = server.http.get("/metrics")
        assert metrics.headers["content-type"].startswith("text/plain")
        assert re.search(r'^transformer_lm_answers_total\{status="200"\} [1-9]', metrics.text, re.M)
        for name in ("written_tokens_total", "first_token_seconds_count", "texts_running 0.0", "texts_waiting 0.0"):
            assert f"transformer_lm_{name}" in metrics.text

    def test_tokenize_and_back(self, server, tokenizer):
        text = "吾輩は猫である。👍"
        found = server.post("/tokenize", model=NAME, prompt=text, return_token_strs=True).json()
        assert found["tokens"] == tokenizer.encode(text)
        assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
        assert found["max_model_len"] == CONTEXT
        assert server.post("/detokenize", tokens=found["tokens"]).json() == {
            "prompt": tokenizer.decode(found["tokens"])
        }
        assert server.post("/detokenize", tokens=[10**6]).status_code == 400
        many = server.post("/tokenize", prompt="a b" * 40_000, return_token_strs=True)
        assert (many.status_code, many.json()["error"]["param"]) == (400, "return_token_strs")

    def test_no_chat_with_a_base_model(self, server):
        with pytest.raises(openai.BadRequestError, match="has no turns") as caught:
            server.openai.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "こんにちは"}])
        assert caught.value.code == "model_has_no_turns"

    def test_the_page_is_whole(self, server):
        """Nothing of it comes from elsewhere, and it knows its model, whose name cannot end its script."""
        answer = server.http.get("/")
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert not re.search(r"""(src|href)=|url\(|@import|https?://""", answer.text)
        [facts] = re.findall(r'<script id="facts" type="application/json">(.*?)</script>', answer.text)
        assert (json.loads(facts)["name"], json.loads(facts)["context"]) == (NAME, CONTEXT)
        words = dict(re.findall(r"^  (ja|en): \{(.*?)^  \},", answer.text, re.M | re.S))
        names = [re.findall(r'(\w+): "', words[language]) for language in ("ja", "en")]
        assert names[0] == names[1]
        said = re.findall(r'data-say="(\w+)"|\b(?:say|sayHere)\("(\w+)"', answer.text)
        assert len(said) > 15
        assert {one or other for one, other in said} <= set(names[0])


class TestErrors:
    @pytest.mark.parametrize(
        ("fields", "param", "words"),
        [
            ({"suffix": "。"}, "suffix", "suffix is not supported"),
            ({"best_of": 2}, "best_of", "not supported"),
            ({"user": "me"}, "user", "not supported"),
            ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
            ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other", "not supported"),
            ({"temperature": -1}, "temperature", "greater than or equal to 0"),
            ({"temperature": "hot"}, "temperature", "number"),
            ({"top_p": 0}, "top_p", "greater than 0"),
            ({"n": 0}, "n", "greater"),
            ({"n": 1000}, "n", "less"),
            ({"logprobs": 21}, "logprobs", "less"),
            ({"stop": [""]}, "stop", "at least 1"),
            ({"max_tokens": -1}, "max_tokens", "greater"),
            ({"logit_bias": {"1000000": 1}}, "logit_bias", "token 1000000"),
            ({"logit_bias": {"5": 101}}, "logit_bias", "100"),
            ({"prompt": 5}, "prompt", "must be a text"),
            ({"prompt": []}, "prompt", "empty list"),
            ({"prompt": [1000000]}, "prompt", "token 1000000"),
            ({"max_tokens": 64}, "prompt", "more than the context of 64"),
            ({"seed": 2**63}, "seed", "less"),
            ({"seed": -(2**63) - 1}, "seed", "greater"),
            ({"prompt": ["昔"] * 10_000, "n": 128}, None, "1280000 texts at once are too many"),
        ],
    )
    def test_impossible_fields_are_named(self, server, fields, param, words):
        answer = server.post(**{"model": NAME, "prompt": "昔々"} | fields)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
        assert words in error["message"]

    def test_more_log_probs_than_an_answer_holds(self, server, monkeypatch):
        """A small request can ask for gigabytes of them."""
        monkeypatch.setattr(completions, "MAX_TOLD", 60)
        asked = {"prompt": [[5, 6], [7]], "n": 2, "max_tokens": 3, "echo": True}
        assert server.post(**asked, logprobs=2).status_code == 200  # (2 + 3 + 1 + 3) * 2 * 3 = 54
        refused = server.post(**asked, logprobs=3)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "logprobs")
        assert "72 log probabilities are too many for one answer" in refused.json()["error"]["message"]
        assert server.post(**asked).status_code == 200

    def test_seeds_as_clients_of_other_servers_send_them(self, server):
        """Any number of 64 bits, and -1 for any seed."""
        texts = [[server.post(prompt="昔", max_tokens=40, seed=seed).json()["choices"][0]["text"] for seed in (a, b)]
                 for a, b in ((-7, -7), (-1, -1))]  # fmt: skip
        assert [one == other for one, other in texts] == [True, False]

    def test_null_is_as_good_as_no_field(self, server):
        assert server.post(prompt="昔", max_tokens=1, suffix=None, logprobs=None, stop=None, n=None).status_code == 200

    @pytest.mark.parametrize(
        "body", [b"{", b"[1]", b'{"prompt": "\\ud800"}', b"\xff", b'{"prompt": "a", "top_p": NaN}']
    )
    def test_what_is_no_request(self, server, body):
        answer = server.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"

    def test_statuses(self, server):
        assert server.post().json()["error"]["code"] == "missing_required_parameter"
        assert server.post(prompt="昔", model="gpt-5").status_code == 404
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            server.openai.completions.create(model="gpt-5", prompt="昔")
        for method, path, status in (("GET", "/v1/completions", 405), ("GET", "/nowhere", 404)):
            answer = server.http.request(method, path)
            assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")
        plain = server.http.post("/v1/completions", content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"})
        assert plain.status_code == 415  # what any web page may send, wherever it is from

    def test_a_failure_of_the_engine_is_told_and_survived(self, server, monkeypatch):
        engine = server.worker.scheduler.engine
        for streamed in (False, True):
            with monkeypatch.context() as patch:
                patch.setattr(engine, "step", lambda: 1 / 0)
                answer = server.post(prompt="昔", stream=streamed)
                assert "ZeroDivisionError" in answer.text
                assert '"server_error"' in answer.text
            assert server.post(prompt="昔", max_tokens=2).status_code == 200

    def test_an_engine_that_cannot_go_on_is_told_to_all(self, network, tokenizer, monkeypatch):
        """Nobody waits for ever: neither who waits when it happens, nor who asks later."""
        engine = Engine(network, init(network), slots=1, context=CONTEXT)
        with serving(Scheduler(engine, tokenizer)) as server:
            monkeypatch.setattr(engine, "step", lambda: 1 / 0)
            monkeypatch.setattr(engine, "reset", lambda: 1 / 0)
            with ThreadPoolExecutor(3) as clients:
                answers = list(clients.map(lambda _: server.post(prompt="昔", max_tokens=2), range(3)))
            assert {answer.status_code for answer in answers} <= {500, 503}
            wait_until(lambda: not server.worker.is_alive)
            late = server.post(prompt="昔")
            assert (late.status_code, late.json()["error"]["message"]) == (503, "The server writes no more texts.")
            assert server.http.get("/health").status_code == 503
            assert not server.worker.open

    def test_a_client_that_goes_while_it_sends_is_no_failure(self, scheduler, caplog):
        with serving(scheduler) as server:
            host, port = server.url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port))) as client:
                head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                client.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            wait_until(lambda: 'answers_total{status="499"} 1.0' in server.http.get("/metrics").text)
            assert 'status="500"' not in server.http.get("/metrics").text
        assert "failed" not in caplog.text


class TestLimits:
    def test_64_clients_at_once(self, server):
        """None is lost, and each gets the text that it gets alone."""
        alone = server.post(prompt="昔々", seed=5, max_tokens=16).json()["choices"][0]["text"]

        async def ask_all():
            async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
                return await asyncio.gather(*map(lambda number: ask(client, number), range(64)))

        async def ask(client, number):
            asked = {"model": NAME, "prompt": "昔々", "seed": 5 + number % 3, "max_tokens": 16}
            if number % 2:
                return (await client.completions.create(**asked)).choices[0].text
            return "".join([c.choices[0].text async for c in await client.completions.create(**asked, stream=True)])

        texts = asyncio.run(ask_all())
        assert texts[::3] == [alone] * 22
        assert len(set(texts)) == 3

    @pytest.mark.parametrize("streamed", [True, False])
    def test_a_client_that_goes_away_frees_its_slot(self, server, streamed):
        body = json.dumps({"prompt": "昔", "stream": streamed, "n": SLOTS, **LONG}).encode()
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
            )  # fmt: skip
            wait_until(lambda: server.worker.scheduler.running)
        wait_until(lambda: not server.worker.open and not server.worker.scheduler.running)

    def test_a_full_queue(self, scheduler):
        with serving(scheduler, limit=3) as server, ThreadPoolExecutor() as pool:
            waiting = pool.submit(server.post, prompt="昔", n=3, **LONG)
            wait_until(lambda: server.worker.open == 3)
            with pytest.raises(openai.RateLimitError, match="3 texts are at work"):
                server.openai.completions.create(model=NAME, prompt="昔")
            assert waiting.result().status_code == 200
            assert server.post(prompt="昔", max_tokens=1).status_code == 200
            assert "too many" in server.post(prompt="昔", n=4).json()["error"]["message"]

    def test_a_large_body(self, scheduler):
        with serving(scheduler, max_body_bytes=1000) as server:
            with pytest.raises(openai.APIStatusError, match="more than 1000 bytes") as caught:
                server.openai.completions.create(model=NAME, prompt="昔" * 1000)
            assert caught.value.status_code == 413
            chunks = iter([b'{"prompt": "'] + [b"a" * 500] * 4)
            answer = server.http.post("/v1/completions", content=chunks, headers={"Content-Type": "application/json"})
            assert answer.status_code == 413

    def test_keys_and_origins(self, scheduler):
        with serving(scheduler, api_key="秘密", cors_origins=("https://a.example",)) as server:
            for key in ("none", "秘"):
                answer = server.http.get("/v1/models", headers={b"Authorization": f"Bearer {key}".encode()})
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert server.http.get("/health").status_code == 200
            key = "Bearer 秘密".encode()
            answer = server.http.get("/v1/models", headers=[(b"Authorization", key), (b"Origin", b"https://a.example")])
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == "https://a.example"
            answer = server.http.get("/health", headers={"Origin": "https://b.example"})
            assert "access-control-allow-origin" not in answer.headers

    def test_a_server_of_this_machine_alone_answers_to_its_names(self, scheduler):
        """A web page whose name comes to mean 127.0.0.1 gets nothing; where there is a key it needs that."""
        hosts = {
            "localhost:8000": 200,
            "127.0.0.1": 200,
            "[::1]:8000": 200,
            "a.localhost": 200,
            "evil.example": 403,
            "[": 403,
        }
        with serving(scheduler, is_local=True) as server:
            for host, status in hosts.items():
                assert server.http.get("/v1/models", headers={"Host": host}).status_code == status
        with serving(scheduler, is_local=True, api_key="a") as server:
            headers = {"Host": "server.example", "Authorization": "Bearer a"}
            assert server.http.get("/v1/models", headers=headers).status_code == 200


def wait_until(holds, seconds: float = 60):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


class TestCommand:
    def start(self, workdir=FIXTURE, name="original", **environment) -> tuple[Fork, str]:
        flags = [f"--workdir={workdir}", "--port=0", "--slots=2", "--context=512"]
        process = Fork([sys.executable, "-m", "transformer_lm.serve", *flags], env=os.environ | environment)
        served = rf"Serving {name} at (http://127\.0\.0\.1:\d+)\."
        wait_until(lambda: process.poll() is not None or re.search(served, process.errors_so_far()))
        found = re.search(served, process.errors_so_far())
        assert found, process.errors_so_far()
        return process, found[1]

    def test_sigterm_finishes_what_has_begun(self):
        process, url = self.start()
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            stream = client.completions.create(
                model="original", prompt="吾輩は", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
            )
            next(stream)
            process.send_signal(signal.SIGTERM)
            reasons = [chunk.choices[0].finish_reason for chunk in stream]
        assert reasons[-1] == "length"
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors

    def test_a_model_of_the_hub(self, tmp_path):
        """By its address there, from the hub's cache: greedy, what the original wrote."""
        files = {name: (FIXTURE / name).read_bytes() for name in ("checkpoint_499999", "sentencepiece_model")}
        make_hub_cache(tmp_path, "someone/small", files, kind="models")
        process, url = self.start("hf://someone/small", "someone/small", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
        prompt = json.loads((FIXTURE / "about.json").read_text())["texts"][0]
        spm = Tokenizer.load(FIXTURE / "sentencepiece_model")
        ids = np.load(FIXTURE / "reference.npz")["greedy"][0].tolist()
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            found = client.completions.create(
                model="someone/small", prompt=prompt, max_tokens=len(ids) - len(spm.encode(prompt)), temperature=0,
                echo=True,
            )  # fmt: skip
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert found.choices[0].text == spm.decode(ids)

    def test_sigterm_as_soon_as_it_serves(self):
        process, _ = self.start()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 0

    def test_errors(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            done = run([sys.executable, "-m", "transformer_lm.serve", f"--workdir={FIXTURE}", f"--port={port}"])
        assert f"Cannot listen on 127.0.0.1:{port}" in one_line_error(done)
        done = run([sys.executable, "-m", "transformer_lm.serve", "--workdir=/no/such/folder", "--port=0"])
        assert "No model at /no/such/folder" in one_line_error(done)
        done = run([sys.executable, "-m", "transformer_lm.serve", f"--workdir={FIXTURE}", "--host="])
        assert "--host= names no address" in one_line_error(done)


UNREAD = """
import socket
from transformer_lm import serve
*others, (level, name, milliseconds) = serve.KEEP_ALIVE
serve.KEEP_ALIVE = (*others, (level, name, milliseconds // 100))
listener = serve._listen("127.0.0.1", 0)
client = socket.create_connection(listener.getsockname())
connection, _ = listener.accept()
while True:
    connection.send(bytes(1 << 16))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives up a client that takes nothing")
def test_a_client_that_takes_nothing_is_given_up():
    done = run_fork([sys.executable, "-c", UNREAD])
    assert "TimeoutError" in done.stderr


def test_a_long_list_of_wrong_things_has_one_error_of_each_kind():
    """Half a million of them in a body took seconds and a gigabyte."""
    with pytest.raises(schema.ApiError, match="prompt must be a text, a list of texts, token ids or"):
        schema.parse(schema.CompletionRequest, json.dumps({"prompt": [{}] * 1000}).encode())
    with pytest.raises(pydantic.ValidationError) as caught:
        schema.CompletionRequest.model_validate_json(json.dumps({"prompt": [{}] * 1000}))
    assert caught.value.error_count() < 10
