"""POST /v1/chat/completions: from a conversation to requests for its next turn, and from their parts to the answer."""

from typing import Any

from transformer_lm.generation.scheduler import Part, Request, Token
from transformer_lm.serving.completions import Answer, requests_of
from transformer_lm.serving.schema import ApiError, ChatRequest, Message
from transformer_lm.tokenizer import EOS_ID
from transformer_lm.tokenizer.turns import Turns


def conversation_ids(messages: list[Message], turns: Turns) -> list[int]:
    """Token ids of a conversation up to where the assistant speaks; raises UserError if it is none."""
    return turns.encode([message.model_dump() for message in messages], add_generation_prompt=True)[0]


def read_chat(asked: ChatRequest, turns: Turns, context: int) -> list[Request]:
    """The n answers that are asked for.

    Raises:
      ApiError: fields that do not go together.
      UserError: the messages are no conversation, or a value is impossible.
    """
    if asked.max_tokens and asked.max_completion_tokens:
        raise ApiError(400, "max_tokens and max_completion_tokens say the same: send one.", param="max_tokens")
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true.", param="top_logprobs")
    ids = conversation_ids(asked.messages, turns)
    options: dict[str, Any] = {"max_tokens": asked.max_completion_tokens or asked.max_tokens}
    options["max_tokens"] = options["max_tokens"] or max(1, context - len(ids))
    if not asked.ignore_eos:
        options |= {"end_ids": turns.end_ids, "stop": list(turns.stop)}
    return requests_of(asked, ids, asked.top_logprobs or 0, **options)


class ChatAnswer(Answer):
    """An answer in a conversation."""

    id, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, turns: Turns, *arguments):
        """As `Answer`, after the turns of its model."""
        super().__init__(*arguments)
        self._turns = turns
        self._begun = [False] * len(self._texts.requests)

    def _first(self) -> list[dict[str, Any]]:
        role = {"delta": {"role": "assistant", "content": ""}, "finish_reason": None, "logprobs": None}
        return [{"index": number, **role} for number in range(len(self._begun))]

    def _whole(self, part: Part) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": self._turns.said(part.text), "refusal": None}}

    def _more(self, number: int, part: Part) -> dict[str, Any]:
        text = part.text if self._begun[number] else self._turns.said(part.text)
        self._begun[number] |= bool(text)
        return {"delta": {"content": text}}

    def _log_probs(self, tokens: list[Token]) -> dict[str, Any]:
        ends = {EOS_ID, *self._texts.requests[0].end_ids}
        return {
            "content": [
                self._told(token.id, token.log_prob)
                | {"top_logprobs": [self._told(*alternative) for alternative in token.alternatives]}
                for token in tokens
                if token.id not in ends
            ],
            "refusal": None,
        }

    def _told(self, token: int, log_prob: float) -> dict[str, Any]:
        name, byte = self._tokenizer.piece_text(token), self._tokenizer.byte_of(token)
        return {"token": name, "logprob": log_prob, "bytes": list(name.encode()) if byte is None else [byte]}
