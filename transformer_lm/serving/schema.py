"""What a client may ask, field by field, and how it is told what is wrong. What is not here is refused, not ignored."""

import json
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from transformer_lm.generation.choosing import LARGEST_SEED, MAX_ALTERNATIVES

MAX_TEXTS = 128  # of one prompt
MAX_STOPS = 16
CODES = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 429: "server_busy", 500: "server_error"}

FIRST = Field(fail_fast=True)  # of a long list the first error says enough
TokenId = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]


class ApiError(Exception):
    """What a client gets in place of an answer, in OpenAI's form."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or CODES.get(status, "invalid_value")

    def body(self) -> dict[str, Any]:
        """The error as JSON has it."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        kind = "server_error" if self.status >= 500 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Body(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str | None = None


class StreamOptions(pydantic.BaseModel):
    """What a stream has besides text."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class _Writing(_Body):
    """How texts are written: OpenAI's fields, and those of vLLM that local models are used to."""

    n: int = Field(1, ge=1, le=MAX_TEXTS)
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS, fail_fast=True)] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions | None = None
    seed: int | None = Field(None, ge=-LARGEST_SEED - 1, le=LARGEST_SEED)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict)
    # Not OpenAI's:
    top_k: int = Field(0, ge=-1, le=2**31 - 1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    ignore_eos: bool = False
    return_token_ids: bool = False


class CompletionRequest(_Writing):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], FIRST]
        | Annotated[list[TokenId], FIRST]
        | Annotated[list[Annotated[list[TokenId], FIRST]], FIRST]
    )
    max_tokens: int = Field(16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_ALTERNATIVES)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts one by one."""
        several = isinstance(self.prompt, list) and isinstance(next(iter(self.prompt), 0), str | list)
        return self.prompt if several else [self.prompt]


class TextPart(pydantic.BaseModel):
    """A part of what somebody says."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(pydantic.BaseModel):
    """What somebody says; whose turn it may be is for the model's turns to say."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    role: str
    content: str | Annotated[list[TextPart], FIRST]


class ChatRequest(_Writing):
    """POST /v1/chat/completions; without a number of tokens an answer may fill the context."""

    messages: Annotated[list[Message], FIRST]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_ALTERNATIVES)


class TokenizeRequest(_Body):
    """POST /tokenize: of a text, or of a conversation that awaits an answer."""

    prompt: str | None = None
    messages: Annotated[list[Message], FIRST] | None = None
    add_special_tokens: Literal[False] = False  # the server puts the start of a text in front of every prompt
    return_token_strs: bool = False


class DetokenizeRequest(_Body):
    """POST /detokenize."""

    tokens: Annotated[list[TokenId], FIRST]


def parse(kind: type[pydantic.BaseModel], body: bytes) -> Any:
    """A request of a kind; raises ApiError that names a field that is wrong. null is as good as no field."""
    try:
        values = _without_null(json.loads(body))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is no JSON: {error}.", code="invalid_json") from error
    if not isinstance(values, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
    try:
        return kind.model_validate_json(json.dumps(values))
    except pydantic.ValidationError as error:
        raise _told(error, kind) from error


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_null(one) for name, one in value.items() if one is not None}
    return [_without_null(one) for one in value] if isinstance(value, list) else value


def _told(error: pydantic.ValidationError, kind: type[pydantic.BaseModel]) -> ApiError:
    first = max(error.errors(include_url=False), key=lambda one: len(one["loc"]))  # of a union's, what came furthest
    param = str(first["loc"][0]) if first["loc"] else None
    if param == "messages":
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"][1:3])
        return ApiError(400, f"messages{place}: {first['msg']}.", param=param)
    if first["type"] == "extra_forbidden":
        name = ".".join(map(str, first["loc"]))
        return ApiError(400, f"{name} is not supported by this server.", param=name, code="unsupported_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{param} is missing.", param=param, code="missing_required_parameter")
    if param == "prompt" and kind is CompletionRequest:
        return ApiError(
            400, "prompt must be a text, a list of texts, token ids or a list of lists of them.", param=param
        )
    return ApiError(400, f"{param or 'The body'}: {first['msg']}.", param=param)
