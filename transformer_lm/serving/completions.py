"""POST /v1/completions: from what a client asks to requests for texts, and from their parts to what it gets."""

import dataclasses
import json
import re
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.concurrency import run_in_threadpool

from transformer_lm.errors import UserError
from transformer_lm.generation.choosing import LARGEST_SEED, Settings
from transformer_lm.generation.scheduler import Part, Request, Token
from transformer_lm.serving.schema import ApiError, ChatRequest, CompletionRequest
from transformer_lm.serving.worker import Texts, WorkerError
from transformer_lm.tokenizer import START_ID, Tokenizer

SETTINGS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
)
ANY_SEED = -1  # as clients of other servers write it
MAX_TOLD = 1 << 19  # log probabilities of an answer, some hundred bytes each


def read_requests(asked: CompletionRequest, tokenizer: Tokenizer) -> list[Request]:
    """The texts that are asked for: of each prompt n, one after the other.

    Raises:
      ApiError: fields that do not go together.
      UserError: an impossible value.
    """
    if not asked.prompt and not isinstance(asked.prompt, str):
        raise ApiError(400, "prompt is an empty list.", param="prompt")
    options = {"max_tokens": asked.max_tokens, "echo": asked.echo, "log_probs": asked.logprobs is not None}
    found = []
    for prompt in asked.prompts:
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        has_start = ids is prompt and ids[:1] == [START_ID]  # in a text it would be an unknown piece
        found += requests_of(asked, ids, asked.logprobs or 0, has_start=has_start, **options)
    return found


def requests_of(asked: CompletionRequest | ChatRequest, prompt: list[int], alternatives: int, **options):
    """The n texts that follow a prompt; `options` are more of `Request`'s fields."""
    if asked.stream_options is not None and not asked.stream:
        raise ApiError(400, "stream_options needs stream=true.", param="stream_options")
    seed = secrets.randbits(63) if asked.seed in (None, ANY_SEED) else asked.seed & LARGEST_SEED
    values = {name: getattr(asked, name) for name in SETTINGS}
    settings = Settings(seed=seed, top_k=max(asked.top_k, 0), alternatives=alternatives, **values)
    stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop)
    options = {"ignore_eos": asked.ignore_eos} | options | {"stop": (*stop, *options.get("stop", ()))}
    return [Request(prompt, settings, number=number, **options) for number in range(asked.n)]


def check_told(asked: CompletionRequest | ChatRequest, requests: list[Request], context: int):
    """Raises ApiError for more log probabilities than an answer should hold in memory."""
    if not _asks_log_probs(asked):
        return
    told = sum(
        (len(one.prompt) * one.echo + min(one.max_tokens, context)) * (1 + one.settings.alternatives)
        for one in requests
    )
    if told > MAX_TOLD:
        raise ApiError(
            400,
            f"logprobs: {told} log probabilities are too many for one answer, which holds {MAX_TOLD}; ask for fewer "
            "texts, tokens or alternatives.",
            param="logprobs",
        )


def _asks_log_probs(asked: CompletionRequest | ChatRequest) -> bool:
    return asked.logprobs is not None and asked.logprobs is not False  # 0 is without alternatives


class Answer:
    """What a client gets, as a whole or in chunks.

    Attributes:
      id: how the answer's name begins.
      whole_kind, chunk_kind: what the answer is called, and a part of it.
    """

    id, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(
        self,
        asked: CompletionRequest | ChatRequest,
        texts: Texts,
        parts: AsyncIterator[tuple[int, Part]],
        tokenizer: Tokenizer,
        model: str,
    ):
        """The answer to what was asked: texts, whose parts come one after the other, by a model of that name."""
        self._asked, self._texts, self._parts, self._tokenizer = asked, texts, parts, tokenizer
        self._written = [0] * len(texts.requests)
        self._head = {
            "id": f"{self.id}-{uuid.uuid4().hex}", "object": "", "created": int(time.time()), "model": model,
        }  # fmt: skip

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of prompts, each counted once, and of all texts."""
        prompt = sum(len(request.prompt) for request in self._texts.requests if request.number == 0)
        written = sum(self._written)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    async def whole(self) -> dict[str, Any]:
        """The answer to a client that waits for all of it."""
        parts: list[list[Part]] = [[] for _ in self._texts.requests]
        async for number, part in self._parts:
            parts[number].append(part)
            self._written[number] = part.written
        return await run_in_threadpool(self._joined, parts)  # where long texts with many alternatives hold nobody up

    def _joined(self, parts: list[list[Part]]) -> dict[str, Any]:
        choices = []
        for number, found in enumerate(parts):
            tokens = [token for part in found for token in part.tokens]
            text = "".join(part.text for part in found)
            whole = Part(text, tokens, finish_reason=found[-1].finish_reason)
            choices.append(self._base(number, whole) | self._whole(whole))
        return {**self._head, "object": self.whole_kind, "choices": choices, "usage": self.usage}

    async def chunks(self) -> AsyncIterator[str]:
        """The answer as server-sent events; a text waits until there is something to show."""
        usage = bool(self._asked.stream_options and self._asked.stream_options.include_usage)
        head = {**self._head, "object": self.chunk_kind, **({"usage": None} if usage else {})}
        tokens: list[list[Token]] = [[] for _ in self._texts.requests]
        try:
            for first in self._first():
                yield _event({**head, "choices": [first]})
            async for number, part in self._parts:
                self._written[number] = part.written
                tokens[number] += part.tokens
                if part.text or part.finish_reason:
                    shown = dataclasses.replace(part, tokens=tokens[number])
                    tokens[number] = []
                    yield _event({**head, "choices": [self._base(number, shown) | self._more(number, shown)]})
            if usage:
                yield _event({**head, "choices": [], "usage": self.usage})
            yield "data: [DONE]\n\n"
        except WorkerError as error:
            yield _event(ApiError(500, str(error)).body())
        finally:
            self._texts.close()

    def _base(self, number: int, part: Part) -> dict[str, Any]:
        """What all kinds of answers tell of a text or a part of it."""
        ids = {"token_ids": [token.id for token in part.tokens]} if self._asked.return_token_ids else {}
        log_probs = self._log_probs(part.tokens) if _asks_log_probs(self._asked) else None
        return {"index": number, "finish_reason": part.finish_reason or None, "logprobs": log_probs, **ids}

    def _first(self) -> list[dict[str, Any]]:
        """The choices of a stream's first chunks, before anything is written."""
        return []

    def _whole(self, part: Part) -> dict[str, Any]:
        return {"text": part.text}

    def _more(self, number: int, part: Part) -> dict[str, Any]:
        return {"text": part.text}

    def _log_probs(self, tokens: list[Token]) -> dict[str, list]:
        name = self._tokenizer.piece_text
        found = {
            "tokens": [name(token.id) for token in tokens],
            "token_logprobs": [token.log_prob for token in tokens],
            "top_logprobs": [
                None if token.log_prob is None
                else {name(id): value for id, value in [*token.alternatives, (token.id, token.log_prob)]}
                for token in tokens
            ],
            "text_offset": [token.offset for token in tokens],
        }  # fmt: skip
        if self._asked.return_token_ids:  # for who would go on from one of them
            found["alternatives"] = [
                [{"id": id, "token": name(id), "logprob": value} for id, value in token.alternatives]
                for token in tokens
            ]
        return found


def _event(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values, ensure_ascii=False, allow_nan=False)}\n\n"


def error_of(error: UserError, asked: CompletionRequest | ChatRequest) -> ApiError:
    """A user's error as a client is told it; it begins with the name of the field."""
    text = str(error)
    field = re.match(r"\w*", text)[0]
    param = field if field in type(asked).model_fields else None
    code = "context_length_exceeded" if "more than the context" in text else None
    return ApiError(400, text, param=param, code=code)
