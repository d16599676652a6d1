"""A reader of Flax's msgpack checkpoints that finds arrays without loading them.

Of a file of untrusted origin it reads lengths and names, skips what nobody asked for, and notes where each array lies;
an array's numbers go straight from the file to where they are wanted. Nothing is executed, no declared size is believed
that the file is too short for, and nesting is bounded. The format: https://github.com/msgpack/msgpack/blob/master/spec.md
and flax.serialization, which packs an array as extension 1, (shape, dtype name, bytes).
"""

import dataclasses
import math
import struct
from typing import Any, BinaryIO

import numpy as np

MAX_DEPTH = 32
MAX_VALUES = 1_000_000  # a model has some hundreds
MAX_NAME_BYTES = 1024
MAX_DIMENSIONS = 8
ARRAY_EXTENSION = 1
DTYPES = ("float32", "float16", "float64")

# What a value is by its first byte, and the big-endian number that follows: its length, or a number itself.
_FORMATS = {
    0xC4: ("bytes", ">B"), 0xC5: ("bytes", ">H"), 0xC6: ("bytes", ">I"),
    0xC7: ("extension", ">B"), 0xC8: ("extension", ">H"), 0xC9: ("extension", ">I"),
    0xCA: ("number", ">f"), 0xCB: ("number", ">d"),
    0xCC: ("number", ">B"), 0xCD: ("number", ">H"), 0xCE: ("number", ">I"), 0xCF: ("number", ">Q"),
    0xD0: ("number", ">b"), 0xD1: ("number", ">h"), 0xD2: ("number", ">i"), 0xD3: ("number", ">q"),
    0xD9: ("text", ">B"), 0xDA: ("text", ">H"), 0xDB: ("text", ">I"),
    0xDC: ("list", ">H"), 0xDD: ("list", ">I"),
    0xDE: ("map", ">H"), 0xDF: ("map", ">I"),
}  # fmt: skip
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


class MalformedError(ValueError):
    """The file is not what it should be."""


class TruncatedError(MalformedError):
    """The file ends too early."""


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """Where an array lies in a file."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read_into(self, file: BinaryIO, out: np.ndarray):
        """Reads the numbers into `out`, a contiguous array of the same shape, converting where its dtype differs."""
        file.seek(self.offset)
        target = out if out.dtype == self.dtype else np.empty(self.shape, self.dtype)
        view = memoryview(target.reshape(-1).view(np.uint8))
        if file.readinto(view) != len(view):
            raise TruncatedError("an array ends too early")
        if target is not out:
            out[...] = target


def read_entry(file: BinaryIO, size: int, name: str) -> Any:
    """The value of an entry of the map that a file holds, with a `StoredArray` for each array in it.

    Args:
      file: seekable and buffered.
      size: its length in bytes.
      name: the entry; what stands before it is skipped, what follows is not looked at.

    Raises:
      TruncatedError: the file ends too early.
      MalformedError: it is no msgpack, or no checkpoint of Flax, or holds no such entry.
    """
    reader = _Reader(file, size)
    kind, entries = reader.read_header()
    if kind != "map":
        raise MalformedError("it does not begin with a map")
    for _ in range(entries):
        reader.keeping_arrays = reader.read(0) == name
        value = reader.read(0)
        if reader.keeping_arrays:
            return value
    raise MalformedError(f"it holds no {name}")


class _Reader:
    """Reads msgpack values one after the other."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size, self._at = file, size, 0
        self._values = 0
        self.keeping_arrays = False  # else they are skipped, whatever they hold

    def _take(self, count: int) -> bytes:
        self._file.seek(self._at)
        self._at += count
        data = self._file.read(count)
        if len(data) < count:
            raise TruncatedError("the file ends too early")
        return data

    def _need(self, count: int):
        if count > self._size - self._at:
            raise TruncatedError(f"the file ends too early: {count} more bytes should follow")

    def read_header(self) -> tuple[str, Any]:
        """What begins here, and its length; of a number (None, True and False count as such) its value."""
        first = self._take(1)[0]
        if first <= 0x7F or first >= 0xE0:
            return "number", first if first <= 0x7F else first - 0x100
        if first <= 0x9F:
            return ("map" if first <= 0x8F else "list"), first & 0x0F
        if first <= 0xBF:
            return "text", first & 0x1F
        if first in _CONSTANTS:
            return "number", _CONSTANTS[first]
        if 0xD4 <= first <= 0xD8:
            return "extension", 1 << (first - 0xD4)
        if first not in _FORMATS:
            raise MalformedError(f"byte {first:#x} begins no value")
        kind, code = _FORMATS[first]
        return kind, struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def read(self, depth: int) -> Any:
        """The value that begins here: dict, list, text, number, StoredArray, or None for other bytes."""
        if depth > MAX_DEPTH:
            raise MalformedError(f"it is nested more than {MAX_DEPTH} deep")
        self._values += 1
        if self._values > MAX_VALUES:
            raise MalformedError(f"it has more than {MAX_VALUES} values")
        kind, value = self.read_header()
        if kind == "number":
            return value
        self._need(value)  # nothing takes less than a byte for each of its parts
        if kind == "map":
            return self._map(value, depth)
        if kind == "list":
            return [self.read(depth + 1) for _ in range(value)]
        if kind == "text":
            return self._text(value)
        if kind == "extension":
            return self._extension(value)
        self._at += value
        return None

    def _map(self, count: int, depth: int) -> dict:
        result = {}
        for _ in range(count):
            key = self.read(depth + 1)
            if not isinstance(key, str):
                raise MalformedError(f"a {type(key).__name__} is the name of an entry")
            result[key] = self.read(depth + 1)
        return result

    def _text(self, count: int) -> str:
        if count > MAX_NAME_BYTES:
            raise MalformedError(f"a text of {count} bytes")
        try:
            return self._take(count).decode()
        except UnicodeDecodeError as error:
            raise MalformedError("a text that is not UTF-8") from error

    def _extension(self, count: int) -> StoredArray | None:
        kind = self._take(1)[0]
        self._need(count)
        end = self._at + count
        array = self._array(end) if kind == ARRAY_EXTENSION and self.keeping_arrays else None
        self._at = end
        return array

    def _array(self, end: int) -> StoredArray:
        if self.read_header() != ("list", 3):
            raise MalformedError("an array that is not (shape, dtype, bytes)")
        shape, dtype = self.read(MAX_DEPTH - 1), self._dtype()
        is_shape = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
        if not is_shape or len(shape) > MAX_DIMENSIONS:
            raise MalformedError(f"an array of shape {str(shape)[:100]}")
        kind, length = self.read_header()
        if (kind, length) != ("bytes", math.prod(shape) * dtype.itemsize) or self._at + length != end:
            raise MalformedError(f"an array of shape {tuple(shape)} and dtype {dtype} in {length} {kind}")
        return StoredArray(self._at, tuple(shape), dtype)

    def _dtype(self) -> np.dtype:
        """The name of a dtype, which Flax packs as a text or, in older versions, as bytes."""
        kind, length = self.read_header()
        name = self._take(min(length, 30)).decode(errors="replace") if kind in ("text", "bytes") else kind
        if name not in DTYPES:
            raise MalformedError(f"an array of dtype {name!r}; {', '.join(DTYPES)} are read")
        return np.dtype(name)
