"""POST /v1/completions: from what a client asks to requests for texts, and from their parts to what it gets."""

import dataclasses
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from transformer_lm.errors import UserError
from transformer_lm.generation.choosing import Settings
from transformer_lm.generation.scheduler import Part, Request, Token
from transformer_lm.serving.schema import ApiError, CompletionRequest
from transformer_lm.serving.worker import Texts, WorkerError
from transformer_lm.tokenizer import Tokenizer

SETTINGS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
)


def read_requests(asked: CompletionRequest, tokenizer: Tokenizer) -> list[Request]:
    """The texts that are asked for: of each prompt n, one after the other.

    Raises:
      ApiError: fields that do not go together.
      UserError: an impossible value.
    """
    if asked.stream_options is not None and not asked.stream:
        raise ApiError(400, "stream_options needs stream=true.", param="stream_options")
    if not asked.prompt and not isinstance(asked.prompt, str):
        raise ApiError(400, "prompt is an empty list.", param="prompt")
    several = isinstance(asked.prompt, list) and isinstance(asked.prompt[0], str | list)
    prompts = asked.prompt if several else [asked.prompt]
    ids = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    seeds = [secrets.randbits(63) if asked.seed is None else asked.seed for _ in ids]
    values = {name: getattr(asked, name) for name in SETTINGS}
    values |= {"top_k": max(asked.top_k, 0), "alternatives": asked.logprobs or 0}
    stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop)
    return [
        Request(
            prompt, Settings(seed=seed, **values), asked.max_tokens, stop, number, asked.echo,
            log_probs=asked.logprobs is not None, ignore_eos=asked.ignore_eos,
        )
        for prompt, seed in zip(ids, seeds, strict=True)
        for number in range(asked.n)
    ]  # fmt: skip


class Answer:
    """What a client gets, as a whole or in chunks."""

    def __init__(
        self,
        asked: CompletionRequest,
        texts: Texts,
        parts: AsyncIterator[tuple[int, Part]],
        tokenizer: Tokenizer,
        model: str,
    ):
        """The answer to what was asked: texts, whose parts come one after the other, by a model of that name."""
        self._asked, self._texts, self._parts, self._tokenizer = asked, texts, parts, tokenizer
        self._written = [0] * len(texts.requests)
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": model,
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
        choices = []
        for number, found in enumerate(parts):
            tokens = [token for part in found for token in part.tokens]
            text = "".join(part.text for part in found)
            choices.append(self._choice(number, Part(text, tokens, finish_reason=found[-1].finish_reason)))
        return {**self._head, "choices": choices, "usage": self.usage}

    async def chunks(self) -> AsyncIterator[str]:
        """The answer as server-sent events; a text waits until there is something to show."""
        usage = bool(self._asked.stream_options and self._asked.stream_options.include_usage)
        usage_later = {"usage": None} if usage else {}
        tokens: list[list[Token]] = [[] for _ in self._texts.requests]
        try:
            async for number, part in self._parts:
                self._written[number] = part.written
                tokens[number] += part.tokens
                if part.text or part.finish_reason:
                    shown = dataclasses.replace(part, tokens=tokens[number])
                    tokens[number] = []
                    yield _event({**self._head, "choices": [self._choice(number, shown)], **usage_later})
            if usage:
                yield _event({**self._head, "choices": [], "usage": self.usage})
            yield "data: [DONE]\n\n"
        except WorkerError as error:
            yield _event(ApiError(500, str(error)).body())
        finally:
            self._texts.close()

    def _choice(self, number: int, part: Part) -> dict[str, Any]:
        choice = {
            "index": number, "text": part.text, "finish_reason": part.finish_reason or None,
            "logprobs": self._log_probs(part.tokens) if self._asked.logprobs is not None else None,
        }  # fmt: skip
        if self._asked.return_token_ids:
            choice["token_ids"] = [token.id for token in part.tokens]
        return choice

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


def error_of(error: UserError) -> ApiError:
    """A user's error as a client is told it; it begins with the name of the field."""
    text = str(error)
    field = text.partition(" ")[0].partition("=")[0]
    param = field if field in CompletionRequest.model_fields else None
    code = "context_length_exceeded" if "more than the context" in text else None
    return ApiError(400, text, param=param, code=code)
