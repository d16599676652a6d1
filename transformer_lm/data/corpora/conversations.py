"""Conversations in the forms that people have them in, as documents: JSON of [{"role": ..., "content": ...}, ...]."""

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from transformer_lm.errors import UserError

# Fields with all turns, besides text_field; each turn has one of SPEAKERS and one of SAID.
TURNS = ("messages", "conversations", "conversation")
SPEAKERS = {"role", "from"}
SAID = {"content", "value"}
# What the speakers are called, and which role that is.
ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
# Fields with one question, with what belongs to it, and with its answer; of each the first that has a text.
QUESTIONS = ("instruction", "prompt", "question", "text")
INPUTS = ("input", "context")
ANSWERS = ("output", "response", "completion", "answer")
FORMS = "messages (role, content), conversations (from, value), instruction (input) output or the like"


def columns(names: Collection[str], text_field: str) -> list[str]:
    """Those of a table's columns that may hold conversations; all where none is known, for an error that names them."""
    known = {text_field, *TURNS, *QUESTIONS, *INPUTS, *ANSWERS}
    return [name for name in names if name in known] or list(names)


def document(record: Any, text_field: str, where: str) -> str:
    """A record as a document; raises UserError, which begins with `where`, if it is in none of the known forms."""
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: not an object with fields.")
    fields = [name for name in (text_field, *TURNS) if isinstance(record.get(name), list)]
    if fields:
        messages = [_message(turn, where, fields[0]) for turn in record[fields[0]]]
    else:
        question, answer = _first(record, QUESTIONS), _first(record, ANSWERS)
        if question is None or answer is None:
            has = ", ".join(map(str, record))[:200]
            raise UserError(f"{where}: no conversation in the fields {has}; known are {FORMS}.")
        texts = [text for text in (question, _first(record, INPUTS)) if text]
        messages = [_said("user", "\n\n".join(texts)), _said("assistant", answer)]
    return json.dumps(messages, ensure_ascii=False)


def _first(record: Mapping, names: Collection[str]) -> str | None:
    """The first text in some fields; of nulls alone, which tables have for fields without one, no text; else None."""
    found = [text for name in names if isinstance(text := record.get(name, 0), str | None)]
    return (_first_known(found) or "") if found else None


def _first_known(values: Iterable) -> Any:
    """The first that is not null."""
    return next((value for value in values if value is not None), None)


def _message(turn: Any, where: str, field: str) -> dict[str, str]:
    """A turn by our names; a role that is unknown stays, and makes the conversation one that is left out."""
    if not isinstance(turn, Mapping) or not (SPEAKERS & turn.keys() and SAID & turn.keys()):
        raise UserError(f"{where}: a turn of {field!r} is not an object with role and content (or from and value).")
    role, text = (_first_known(turn[name] for name in sorted(names & turn.keys())) for names in (SPEAKERS, SAID))
    if not isinstance(text, str | list | None):
        raise UserError(f"{where}: a turn of {field!r} says a {type(text).__name__}, not a text.")
    return _said(ROLES.get(str(role), str(role)), text or "")


def _said(role: str, text: Any) -> dict[str, Any]:
    return {"role": role, "content": text.replace("\0", "") if isinstance(text, str) else text}
