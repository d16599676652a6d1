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

# Big-endian numbers by their first byte, as `struct` has them.
_NUMBERS = {
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
    0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip
_SIZES = {1: ">B", 2: ">H", 4: ">I"}


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
    for _ in range(reader.read_map_header()):
        reader.keeping_arrays = reader.read(0) == name
        value = reader.read(0)
        if reader.keeping_arrays:
            return value
    raise MalformedError(f"it holds no {name}")


def _begins_map(first: int) -> bool:
    return first >> 4 == 0x8 or first in (0xDE, 0xDF)


class _Reader:
    """Reads msgpack values one after the other."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size, self._at = file, size, 0
        self._values = 0
        self.keeping_arrays = False  # else they are skipped, whatever they hold

    def _take(self, count: int) -> bytes:
        self._need(count)
        self._file.seek(self._at)
        self._at += count
        data = self._file.read(count)
        if len(data) < count:
            raise TruncatedError("the file ends too early")
        return data

    def _need(self, count: int):
        if count > self._size - self._at:
            raise TruncatedError(f"the file ends too early: {count} more bytes should follow")

    def _number(self, code: str) -> int | float:
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def read_map_header(self) -> int:
        """The number of entries of the map that begins here."""
        first = self._take(1)[0]
        if not _begins_map(first):
            raise MalformedError("it does not begin with a map")
        return self._map_count(first)

    def _map_count(self, first: int) -> int:
        return first & 0x0F if first <= 0x8F else self._number(_SIZES[2 << (first - 0xDE)])

    def read(self, depth: int) -> Any:
        """The value that begins here: dict, list, text, number, StoredArray, or None for other bytes."""
        if depth > MAX_DEPTH:
            raise MalformedError(f"it is nested more than {MAX_DEPTH} deep")
        self._values += 1
        if self._values > MAX_VALUES:
            raise MalformedError(f"it has more than {MAX_VALUES} values")
        first = self._take(1)[0]
        if first <= 0x7F or first >= 0xE0:
            return first if first <= 0x7F else first - 0x100
        if _begins_map(first):
            return self._map(self._map_count(first), depth)
        if first <= 0x9F or first in (0xDC, 0xDD):
            count = first & 0x0F if first <= 0x9F else self._number(_SIZES[2 << (first - 0xDC)])
            self._need(count)
            return [self.read(depth + 1) for _ in range(count)]
        if first <= 0xBF or 0xD9 <= first <= 0xDB:
            return self._text(first & 0x1F if first <= 0xBF else self._number(_SIZES[1 << (first - 0xD9)]))
        if first in (0xC0, 0xC2, 0xC3):
            return None if first == 0xC0 else first == 0xC3
        if 0xC4 <= first <= 0xC6:
            return self._skip(self._number(_SIZES[1 << (first - 0xC4)]))
        if 0xC7 <= first <= 0xC9:
            return self._extension(self._number(_SIZES[1 << (first - 0xC7)]))
        if 0xD4 <= first <= 0xD8:
            return self._extension(1 << (first - 0xD4))
        if first in _NUMBERS:
            return self._number(_NUMBERS[first])
        raise MalformedError(f"byte {first:#x} begins no value")

    def _map(self, count: int, depth: int) -> dict:
        self._need(2 * count)
        result = {}
        for _ in range(count):
            key = self.read(depth + 1)
            if not isinstance(key, str):
                raise MalformedError(f"a {type(key).__name__} is the name of an entry")
            result[key] = self.read(depth + 1)
        return result

    def _text(self, count: int) -> str:
        if count > MAX_NAME_BYTES:
            self._need(count)
            raise MalformedError(f"a text of {count} bytes")
        try:
            return self._take(count).decode()
        except UnicodeDecodeError as error:
            raise MalformedError("a text that is not UTF-8") from error

    def _skip(self, count: int) -> None:
        self._need(count)
        self._at += count

    def _extension(self, count: int) -> StoredArray | None:
        kind = self._number(">b")
        self._need(count)
        end = self._at + count
        if kind != ARRAY_EXTENSION or not self.keeping_arrays:
            self._at = end
            return None
        if self._take(1) != b"\x93":
            raise MalformedError("an array that is not (shape, dtype, bytes)")
        shape, dtype = self.read(MAX_DEPTH - 1), self._read_dtype()
        first = self._take(1)[0]
        if not 0xC4 <= first <= 0xC6:
            raise MalformedError("an array without bytes")
        length = self._number(_SIZES[1 << (first - 0xC4)])
        if (
            not isinstance(shape, list)
            or len(shape) > MAX_DIMENSIONS
            or not all(type(n) is int and n >= 0 for n in shape)
        ):
            raise MalformedError(f"an array of shape {str(shape)[:100]}")
        offset = self._at
        if offset + length != end or length != math.prod(shape) * dtype.itemsize:
            raise MalformedError(f"an array of shape {tuple(shape)} and dtype {dtype} in {length} bytes")
        self._at = end
        return StoredArray(offset, tuple(shape), dtype)

    def _read_dtype(self) -> np.dtype:
        """The name of a dtype, which Flax packs as a text or, in older versions, as bytes."""
        first = self._take(1)[0]
        if first >> 5 == 0b101:
            name = self._take(first & 0x1F)
        elif first in (0xC4, 0xD9):
            name = self._take(self._number(">B"))
        else:
            raise MalformedError("an array without a dtype")
        if name.decode(errors="replace") not in DTYPES:
            raise MalformedError(f"an array of dtype {name[:30]!r}; {', '.join(DTYPES)} are read")
        return np.dtype(name.decode())
