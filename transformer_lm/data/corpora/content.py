"""What a file holds, by its first bytes: the ending of its name may be wrong."""

import bz2
import codecs
import gzip
import io
import lzma
import os
import re
import sys
from typing import BinaryIO

from transformer_lm.errors import UserError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

BUFFER_BYTES = 1 << 20
HEAD_BYTES = 1 << 16
MAX_NULS = 0.1  # share of NUL bytes above which a file is no text

# Ending: how such files begin, and what opens them.
COMPRESSIONS = {
    ".gz": (rb"\x1f\x8b", gzip.open),
    ".bz2": (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", bz2.open),
    ".xz": (rb"\xfd7zXZ\0", lzma.open),
    ".zst": (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\*M\x18", zstd.open),  # the latter is a frame of metadata, as pzstd's
}
NOT_TEXT = {
    "a zip archive": rb"PK(\x03\x04|\x05\x06|\x07\x08)",
    "a tar archive": rb"(?s).{257}ustar[ \0]",
    "a 7z archive": rb"7z\xbc\xaf'\x1c",
    "a rar archive": rb"Rar!\x1a\x07",
    "a Parquet file": rb"PAR1",
    "a PDF": rb"%PDF-",
    "an SQLite database": rb"SQLite format 3\0",
    "text in UTF-16 or UTF-32, not UTF-8": b"|".join(
        map(re.escape, (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE))
    ),
}
# How ISO-2022-JP and its kin go over to Japanese; all of their bytes are those of ASCII, too.
_ISO_2022_JP = re.compile(rb"\x1b(\$[@AB]|\$\([CDOPQ]|\([IJ])")


def decompressed(raw: BinaryIO, path: str) -> io.BufferedReader:
    """The content of a file, decompressed where it is compressed, whatever its ending; `path` names it in errors."""
    file = io.BufferedReader(raw, BUFFER_BYTES)
    expected = os.path.splitext(path)[1].lower()
    found = _compression(file.peek(HEAD_BYTES))
    if found is None:
        if expected in COMPRESSIONS:
            raise UserError(
                f"{path} does not hold what its ending says: it begins with {file.peek()[:8]!r}, not as a {expected} "
                "file does. Fetch it anew, or rename it."
            )
        return file
    file = io.BufferedReader(COMPRESSIONS[found][1](file), BUFFER_BYTES)
    if inner := _compression(file.peek(HEAD_BYTES)):
        raise UserError(f"{path} holds a compressed {inner} file in a compressed {found} file; unpack one of them.")
    return file


def _compression(head: bytes) -> str | None:
    return next((ending for ending, (magic, _) in COMPRESSIONS.items() if re.match(magic, head)), None)


def check_text(head: bytes, path: str):
    """Raises UserError where a file begins as an archive or another binary file, whose bytes would become documents."""
    head = head[:HEAD_BYTES]
    kind = next((kind for kind, magic in NOT_TEXT.items() if re.match(magic, head)), None)
    if kind is None and head.count(0) > MAX_NULS * len(head):
        kind = "a binary file"
    if kind:
        raise UserError(f"{path} holds {kind}, where text is expected; unpack or convert it first.")


def check_encoding(data: bytes, where: str):
    """Raises UserError where bytes are in ISO-2022-JP, which decodes as UTF-8 to other characters without an error."""
    if _ISO_2022_JP.search(data):
        raise UserError(
            f"{where}: ISO-2022-JP, not UTF-8; convert the file, for example with iconv -f ISO-2022-JP -t UTF-8."
        )
