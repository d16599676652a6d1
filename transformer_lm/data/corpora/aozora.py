"""Works of Aozora Bunko in their own notation and encoding -> plain text.

The notation: https://www.aozora.gr.jp/annotation/. Ruby 《》 with its mark ｜ and editors' notes ［＃ ］ are removed,
characters that Shift_JIS lacks (※［＃「口＋世」、U+546D］) become what they are, and header and colophon go.
"""

import io
import re
import zipfile

from transformer_lm.data.corpora.base import library_errors
from transformer_lm.errors import UserError
from transformer_lm.extras import optional_import

MAX_BYTES = 64 << 20  # the longest works have some 6 MB
UNKNOWN_CHARACTER = "〓"  # the printers' mark for a character that is not at hand
_RULE = re.compile(r"^-{20,}[ \u3000]*$", re.MULTILINE)  # lines of hyphens around the explanation of the notation
_COLOPHON = re.compile(r"^底本[：:]", re.MULTILINE)
_RUBY = re.compile(r"《[^《》\n]*》")
_NOTE = re.compile(r"［＃[^［］]*］")
_BLANK_LINES = re.compile(r"\n{3,}")
_PRIVATE = 0xF0000  # a private-use plane, for characters that must outlive the removal of the notation
_PRIVATE_PLANE = re.compile("[\U000f0000-\U000ffffd]")
MAX_NESTING = 100  # of notes in notes


def plain_text(data: bytes, path: str = "") -> str:
    """The text of a work alone.

    Args:
      data: the file, Shift_JIS or UTF-8.
      path: names it in errors.
    """
    library = optional_import("aozora", "aozora", "Reading aozora: files")
    try:
        document = library.Document.from_bytes(data)
    except ValueError as error:
        raise UserError(f"{path} is neither Shift_JIS nor UTF-8, as files of Aozora Bunko are: {error}") from error
    source = document.source.encode()
    parts, end, characters = [], 0, []
    for gaiji in document.gaiji():
        if gaiji.span.start < end:
            continue  # inside another
        parts += [_without_private(source[end : gaiji.span.start]), chr(_PRIVATE + len(characters))]
        characters.append(gaiji.resolved or UNKNOWN_CHARACTER)
        end = gaiji.span.end
    text = "".join([*parts, _without_private(source[end:])]).replace("\r\n", "\n")
    text = _body(text)
    text = _RUBY.sub("", text).replace("｜", "")
    for _ in range(MAX_NESTING):  # notes may stand in notes
        if (shorter := _NOTE.sub("", text)) == text:
            break
        text = shorter
    text = _PRIVATE_PLANE.sub(lambda match: characters[ord(match[0]) - _PRIVATE], text)
    return _BLANK_LINES.sub("\n\n", text).strip("\n")


def _without_private(source: bytes) -> str:
    """A part of the file as text, in which no character of that plane stands for another one."""
    return _PRIVATE_PLANE.sub(UNKNOWN_CHARACTER, source.decode())


def _body(text: str) -> str:
    """Without the header (title, author, explanation of the notation) and the colophon (底本：...)."""
    rules = list(_RULE.finditer(text))
    after_title = text.lstrip("\n").partition("\n\n")[2] or text  # title and author stand before a blank line
    text = text[rules[1].end() :] if len(rules) >= 2 else after_title
    colophons = list(_COLOPHON.finditer(text))
    return text[: colophons[-1].start()] if colophons else text


def unzip(data: bytes, path: str) -> bytes:
    """The .txt in a .zip as Aozora Bunko publishes it; data of another kind as they are. At most MAX_BYTES."""
    if data.startswith((b"PK\x03\x04", b"PK\x05\x06")) and len(data) <= MAX_BYTES:
        with (
            library_errors(lambda: f"{path} cannot be unpacked; unpack it and name its .txt"),
            zipfile.ZipFile(io.BytesIO(data)) as archive,
        ):
            infos = [info for info in archive.infolist() if info.filename.lower().endswith(".txt")]
            if len(infos) != 1:
                raise UserError(f"{path} holds {len(infos)} .txt files and not one; unpack it and name them.")
            data = archive.open(infos[0]).read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UserError(f"{path} holds more than {MAX_BYTES >> 20} MB, as no work of Aozora Bunko does.")
    return data
