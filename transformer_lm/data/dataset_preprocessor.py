"""What each corpus needs before it is text.

A preprocessor is a plain function from one document, as it stands in its source, to the texts in it. To add one, write
the function and a line in PREPROCESSORS; a recipe names it by `preprocessor`, or uses a dataset of that very name.
"""

import dataclasses
import hashlib
import inspect
import itertools
import json
import re
import types
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from transformer_lm.errors import UserError
from transformer_lm.tokenizer import SURROGATE
from transformer_lm.tokenizer.turns import read_messages

CONVERSATIONS = "conversations"
MIN_PARAGRAPH_CHARS = 10
PATTERN_CHARS = 200  # of a longer regular expression Python's repr shows no more
_PLAIN = str | int | float | complex | bytes | bytearray | range | tuple | list | dict | set | frozenset | re.Pattern


def plain(document: str) -> list[str]:
    """The document as it is."""
    return [document]


def wiki40b(document: str) -> list[str]:
    """The line after each _START_PARAGRAPH_, split at _NEWLINE_, without what is shorter than 10 characters.

    Titles of articles and sections go. Source: the original's preprocessor of wiki40b/ja.
    """
    lines = document.split("\n")
    paragraphs = (after for mark, after in itertools.pairwise(lines) if mark == "_START_PARAGRAPH_")
    texts = (text for paragraph in paragraphs for text in paragraph.split("_NEWLINE_"))
    return [text for text in texts if len(text) >= MIN_PARAGRAPH_CHARS]


def cc100(document: str) -> list[str]:
    """The document without line ends, unless nothing is left. Source: the original's preprocessor of cc100."""
    text = document.replace("\n", "")
    return [text] if text else []


def conversations(document: str) -> list[str]:
    """A conversation (JSON of messages) to the assistant's last turn; none where turns are missing or in no order.

    An answer that is missing ends it, too: nobody is to learn to say nothing.
    """
    messages = list(itertools.takewhile(lambda message: not _is_no_answer(message), json.loads(document)))
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    try:
        read_messages(messages)
    except UserError:
        return []
    return [json.dumps(messages, ensure_ascii=False)]


def _is_no_answer(message: dict) -> bool:
    content = message["content"]
    return message["role"] == "assistant" and (not content.strip() if isinstance(content, str) else not content)


def without_impossible_characters(document: str) -> tuple[str, dict[str, int]]:
    """The document without what no text may hold, and how much of it there was.

    NUL goes, since SentencePiece leaves out the lines that it trains on where one is; half a surrogate pair, which JSON
    can write but UTF-8 cannot, becomes U+FFFD.
    """
    text, surrogates = SURROGATE.subn("\ufffd", document)
    return text.replace("\0", ""), {"nul_characters": text.count("\0"), "lone_surrogates": surrogates}


PREPROCESSORS: dict[str, Callable[[str], list[str]]] = {
    "plain": plain,
    "lm1b": plain,
    "wiki40b/ja": wiki40b,
    "huggingface:wiki40b/ja": wiki40b,
    "huggingface:cc100/lang=ja": cc100,
    CONVERSATIONS: conversations,
}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """From a document to the texts that are tokenized.

    Attributes:
      preprocessor: a key of PREPROCESSORS.
      unicode_normalization: "" for none, or "NFC", "NFKC" and the like (Unicode Standard Annex 15), applied first.
    """

    preprocessor: str = "plain"
    unicode_normalization: str = ""

    def __post_init__(self):
        if self.preprocessor not in PREPROCESSORS:
            raise UserError(f"preprocessor={self.preprocessor!r} must be one of {', '.join(PREPROCESSORS)}.")
        if self.unicode_normalization not in ("", "NFC", "NFD", "NFKC", "NFKD"):
            raise UserError(f"unicode_normalization={self.unicode_normalization!r} must be NFC, NFKC, NFD, NFKD or ''.")

    def __call__(self, document: str) -> list[str]:
        """The texts of a document that hold anything, without impossible characters; may be none."""
        document, _ = without_impossible_characters(document)
        if self.unicode_normalization:
            document = unicodedata.normalize(self.unicode_normalization, document)
        return [text for text in PREPROCESSORS[self.preprocessor](document) if text.strip()]

    @property
    def has_turns(self) -> bool:
        """Whether its texts are conversations, JSON of messages."""
        return self.preprocessor == CONVERSATIONS

    @property
    def fingerprint(self) -> str:
        """A text that changes when the texts may: with the preprocessor's code, too, so that no stale rows are met."""
        code = "".join(_code(PREPROCESSORS[self.preprocessor]))
        tables = unicodedata.unidata_version if self.unicode_normalization else ""  # which grow with Python's version
        return hashlib.sha256(f"{self} {tables} {code}".encode()).hexdigest()[:16]


def _code(function: Callable, seen: frozenset = frozenset()) -> Iterator[str]:
    """The source of a function, and of what it uses of its module: functions, and the values of constants."""
    yield inspect.getsource(function)
    seen |= {function}
    for name in sorted(set(_names(function.__code__))):
        value = function.__globals__.get(name)
        if inspect.isfunction(value) and value.__module__ == function.__module__ and value not in seen:
            yield from _code(value, seen)
        elif isinstance(value, _PLAIN):
            yield f"{name} = {_as_told(value)!r}"


def _as_told(value: Any) -> Any:
    """A constant whose repr tells all of its data, and the same in every process, whatever the order of its sets."""
    match value:
        case tuple():
            return tuple(map(_as_told, value))
        case list():
            return list(map(_as_told, value))
        case dict():
            return "dict", [(_as_told(key), _as_told(item)) for key, item in value.items()]
        case set() | frozenset():
            return "set", sorted(repr(_as_told(item)) for item in value)
        case re.Pattern() if len(repr(value.pattern)) > PATTERN_CHARS:
            return value.pattern, value.flags
    return value if value is None or isinstance(value, _PLAIN) else type(value).__qualname__


def _names(code: types.CodeType) -> Iterator[str]:
    """The names that code looks up, of globals among others; that of functions within, too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def for_dataset(name: str, preprocessor: str | None, unicode_normalization: str) -> Preprocessing:
    """The preprocessing of a dataset: the preprocessor given, or else that of the dataset's name, or else `plain`."""
    return Preprocessing(preprocessor or (name if name in PREPROCESSORS else "plain"), unicode_normalization)


def texts_of(documents: Iterable[str], preprocessing: Preprocessing) -> Iterator[str]:
    """All texts of a corpus, of conversations what is said in them."""
    for document in documents:
        for text in preprocessing(document):
            spoken = read_messages(json.loads(text)) if preprocessing.has_turns else None
            yield text if spoken is None else "\n".join(message.text for message in spoken)
