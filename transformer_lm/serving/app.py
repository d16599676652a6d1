"""The application: what stands at which address, who may ask, how much at once, and what is measured."""

import asyncio
import contextlib
import dataclasses
import ipaddress
import json
import secrets
import socket
import time
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import prometheus_client
from absl import logging
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from transformer_lm.errors import UserError, one_line
from transformer_lm.generation.sampler import SamplingConfig
from transformer_lm.generation.scheduler import Part, Scheduler
from transformer_lm.serving import schema
from transformer_lm.serving.chat import ChatAnswer, conversation_ids, read_chat
from transformer_lm.serving.completions import Answer, check_told, error_of, read_requests
from transformer_lm.serving.schema import ApiError
from transformer_lm.serving.worker import BusyError, Texts, Worker, WorkerError
from transformer_lm.tokenizer import EOS_ID
from transformer_lm.tokenizer.turns import Turns

NO_TURNS = (
    "This model continues texts; it was not trained on conversations and has no turns, so that there is no chat. "
    "Ask POST /v1/completions."
)
GONE = "The client has gone."
MAX_TOKEN_STRS = 100_000  # tokens whose names /tokenize gives
NOT_LOCAL = (
    "This server listens on this machine alone, and answers no name but those of this machine, so that no web page can "
    "reach it by another one. Ask for localhost, or begin it with --api_key or another --host."
)
PAGE = Path(__file__).with_name("page.html")
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
TIMES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # seconds, borders of the histograms


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """What a server is told besides its model."""

    name: str  # of the model
    api_key: str = ""  # without which nothing is answered but / and /health; "" for none
    max_body_bytes: int = 1 << 20
    is_local: bool = False  # whether it listens on this machine alone: without a key other names are refused then
    cors_origins: tuple[str, ...] = ()  # whose pages may ask; "*" for all
    turns: Turns | None = None  # of conversations, where the model was trained on them
    # What the page begins with, and whether it says that this model knows tales alone.
    openings: tuple[str, ...] = ()
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    is_mukashi: bool = False


class Metrics:
    """What /metrics tells, of this server alone."""

    def __init__(self, worker: Worker):
        self.registry = prometheus_client.CollectorRegistry()
        kind = {"registry": self.registry, "namespace": "transformer_lm"}
        running = prometheus_client.Gauge("texts_running", "Texts that are being written.", **kind)
        running.set_function(lambda: worker.scheduler.running)
        waiting = prometheus_client.Gauge("texts_waiting", "Texts that wait for a slot.", **kind)
        waiting.set_function(lambda: max(0, worker.open - worker.scheduler.running))
        self.answers = prometheus_client.Counter("answers", "Answers by HTTP status.", ["status"], **kind)
        self.prompt_tokens = prometheus_client.Counter("prompt_tokens", "Tokens of prompts.", **kind)
        self.written_tokens = prometheus_client.Counter("written_tokens", "Tokens that were written.", **kind)
        self.first_token = prometheus_client.Histogram(
            "first_token_seconds", "From a request to the first token of one of its texts.", buckets=TIMES, **kind
        )
        self.whole = prometheus_client.Histogram(
            "request_seconds", "From a request to the end of its texts.", buckets=TIMES, **kind
        )

    async def watched(self, texts: Texts) -> AsyncIterator[tuple[int, Part]]:
        """The parts of texts, measured as they pass."""
        start, written = time.perf_counter(), [0] * len(texts.requests)
        self.prompt_tokens.inc(sum(len(request.prompt) for request in texts.requests if request.number == 0))
        async for number, part in texts.parts():
            if part.written and not any(written):
                self.first_token.observe(time.perf_counter() - start)
            self.written_tokens.inc(part.written - written[number])
            written[number] = max(written[number], part.written)
            yield number, part
        self.whole.observe(time.perf_counter() - start)


class Server:
    """The endpoints of one model."""

    def __init__(self, scheduler: Scheduler, worker: Worker, config: ServerConfig):
        self.scheduler, self.worker, self.config = scheduler, worker, config
        self.tokenizer, self.metrics = scheduler.tokenizer, Metrics(worker)
        self.created = int(time.time())

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        self._check_name(request.path_params["name"])
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.config.name, "object": "model", "created": self.created, "owned_by": "transformer-lm-japanese",
            "max_model_len": self.scheduler.engine.context,
        }  # fmt: skip

    def _check_name(self, name: str | None):
        """Raises ApiError for another model than this server's."""
        if name not in (None, self.config.name):
            message = f"The model {name!r} does not exist; this server has {self.config.name!r}."
            raise ApiError(404, message, param="model", code="model_not_found")

    async def page(self, request: Request) -> Response:
        """GET /."""
        sampling = self.config.sampling
        facts = {
            "name": self.config.name, "context": self.scheduler.engine.context, "eos": EOS_ID,
            "has_turns": self.config.turns is not None, "openings": self.config.openings,
            "is_mukashi": self.config.is_mukashi,
            "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p,
        }  # fmt: skip
        text = PAGE.read_text(encoding="utf-8")
        text = text.replace("{{facts}}", json.dumps(facts, ensure_ascii=False).replace("<", "\\u003c"))
        return HTMLResponse(text, headers={"Content-Security-Policy": PAGE_POLICY})

    async def health(self, request: Request) -> Response:
        """GET /health."""
        alive = self.worker.is_alive
        return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    async def show_metrics(self, request: Request) -> Response:
        """GET /metrics."""
        text = prometheus_client.generate_latest(self.metrics.registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        asked = await self._read(request, schema.CompletionRequest)
        count = len(asked.prompts) * asked.n
        return await self._write(request, asked, count, Answer, lambda: read_requests(asked, self.tokenizer))

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        turns = self._turns()
        asked = await self._read(request, schema.ChatRequest)
        context = self.scheduler.engine.context
        return await self._write(
            request, asked, asked.n, partial(ChatAnswer, turns), lambda: read_chat(asked, turns, context)
        )

    def _turns(self) -> Turns:
        if self.config.turns is None:
            raise ApiError(400, NO_TURNS, param="messages", code="model_has_no_turns")
        return self.config.turns

    async def _write(
        self, request: Request, asked, count: int, kind: Callable[..., Answer], read: Callable
    ) -> Response:
        """The answer to a request for so many texts, which are read from it in another thread: prompts may be long."""
        try:
            self.worker.check_room(count)
            requests = await run_in_threadpool(read)
            check_told(asked, requests, self.scheduler.engine.context)
            texts = self.worker.submit(requests)
        except UserError as error:
            raise error_of(error, asked) from error
        except BusyError as error:
            raise ApiError(429, str(error)) from error
        except WorkerError as error:
            raise ApiError(503, str(error)) from error
        answer = kind(asked, texts, self.metrics.watched(texts), self.tokenizer, self.config.name)
        if asked.stream:
            return StreamingResponse(
                answer.chunks(), media_type="text/event-stream",
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            )  # fmt: skip
        try:
            return await run_in_threadpool(JSONResponse, await _unless_gone(request, answer.whole()))
        except WorkerError as error:
            raise ApiError(500, str(error)) from error
        finally:
            texts.close()

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize."""
        asked = await self._read(request, schema.TokenizeRequest)
        if (asked.prompt is None) == (asked.messages is None):
            raise ApiError(400, "Send either prompt or messages.", param="prompt", code="missing_required_parameter")
        try:
            if asked.messages is not None:
                ids = await run_in_threadpool(conversation_ids, asked.messages, self._turns())
            else:
                ids = await run_in_threadpool(self.tokenizer.encode, asked.prompt)
        except UserError as error:
            raise error_of(error, asked) from error
        if asked.return_token_strs and len(ids) > MAX_TOKEN_STRS:
            message = f"return_token_strs: {len(ids)} tokens are more than the {MAX_TOKEN_STRS} that it names."
            raise ApiError(400, message, param="return_token_strs")

        def answer() -> Response:
            names = [self.tokenizer.piece_text(token) for token in ids] if asked.return_token_strs else None
            room = self.scheduler.engine.context
            return JSONResponse({"count": len(ids), "max_model_len": room, "tokens": ids, "token_strs": names})

        return await run_in_threadpool(answer)

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        asked = await self._read(request, schema.DetokenizeRequest)
        try:
            return JSONResponse({"prompt": await run_in_threadpool(self.tokenizer.decode, asked.tokens)})
        except UserError as error:
            raise ApiError(400, str(error), param="tokens") from error

    async def tokenizer_info(self, request: Request) -> Response:
        """GET /tokenizer_info: what lm-evaluation-harness asks before it uses /tokenize; no mark stands for a token."""
        names = dict.fromkeys(("bos_token", "eos_token", "pad_token"))
        return JSONResponse({"tokenizer_class": "SentencePieceProcessor", **names})

    async def _read(self, request: Request, kind: type):
        """The body as a request of a kind, for this model."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "The body must be JSON: send Content-Type: application/json.")
        limit, body = self.config.max_body_bytes, bytearray()
        declared = request.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) <= limit:
            try:
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        break
            except ClientDisconnect as error:
                raise ApiError(499, GONE) from error
        if max(len(body), int(declared) if declared.isdigit() else 0) > limit:
            raise ApiError(413, f"The body has more than {limit} bytes.", code="body_too_large")
        asked = schema.parse(kind, bytes(body))
        self._check_name(asked.model)
        return asked


async def _unless_gone(request: Request, work: Awaitable[dict]) -> dict:
    """The result of work, which ends when the client goes away."""

    async def gone():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0] not in done:
            raise ApiError(499, GONE)
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


def _is_of_this_machine(host: str) -> bool:
    """Whether a Host header has an address or a name of this machine, which no name of the web can stand for.

    A page's own name may come to mean 127.0.0.1 while it is open (DNS rebinding), and then asks as if from here.
    """
    name = ""
    with contextlib.suppress(ValueError):  # such as [
        name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        return bool(ipaddress.ip_address(name))
    return name in ("localhost", socket.gethostname().lower()) or name.endswith(".localhost")


def make_app(scheduler: Scheduler, worker: Worker, config: ServerConfig) -> Starlette:
    """The ASGI application."""
    server = Server(scheduler, worker, config)

    def guarded(endpoint: Callable[[Request], Awaitable[Response]]):
        async def answer(request: Request) -> Response:
            key = request.headers.get("authorization", "").removeprefix("Bearer ")
            if config.api_key and not secrets.compare_digest(key.encode("latin-1"), config.api_key.encode()):
                raise ApiError(401, "The API key is missing or wrong: send Authorization: Bearer KEY.")
            if config.is_local and not config.api_key and not _is_of_this_machine(request.headers.get("host", "")):
                raise ApiError(403, NOT_LOCAL)
            response = await endpoint(request)
            server.metrics.answers.labels(response.status_code).inc()
            return response

        return answer

    async def tell(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}.")
        if not isinstance(error, ApiError):
            logging.error("%s %s failed: %s", request.method, request.url.path, one_line(error))
            error = ApiError(500, "The server failed; its log says why.")
        server.metrics.answers.labels(error.status).inc()
        headers = {"Retry-After": "1"} if error.status == 429 else {}
        headers |= {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
        return JSONResponse(error.body(), error.status, headers)

    routes = [
        Route("/", server.page),
        Route("/health", server.health),
        Route("/metrics", guarded(server.show_metrics)),
        Route("/v1/models", guarded(server.models)),
        Route("/v1/models/{name:path}", guarded(server.model)),
        Route("/v1/completions", guarded(server.complete), methods=["POST"]),
        Route("/v1/chat/completions", guarded(server.chat), methods=["POST"]),
        Route("/tokenize", guarded(server.tokenize), methods=["POST"]),
        Route("/tokenizer_info", guarded(server.tokenizer_info)),
        Route("/detokenize", guarded(server.detokenize), methods=["POST"]),
    ]
    cors = Middleware(CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["*"], allow_headers=["*"])
    return Starlette(
        routes=routes,
        middleware=[cors] if config.cors_origins else [],
        exception_handlers={ApiError: tell, HTTPException: tell, Exception: tell},
    )
