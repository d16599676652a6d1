"""Values that users choose: the type of a dataclass's field says what it may be, and `check` holds it to that.

@dataclasses.dataclass(frozen=True)
class Settings:
    steps: Count
    rate: Rate = 0.1

    def __post_init__(self):
        check(self)
"""

import math
import numbers
import typing
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from transformer_lm.errors import UserError

LARGEST = 2**31 - 1  # int32, in which the network counts
LARGEST_FLOAT = 3.4e38  # float32


class Range(NamedTuple):
    """Which numbers a field takes; bounds that are None do not bind."""

    least: float | None = None
    above: float | None = None
    most: float | None = LARGEST_FLOAT
    below: float | None = None

    def broken_by(self, value: float) -> str:
        """What the value is not, but must be; "" if it is all right."""
        if not math.isfinite(value):
            return "finite"
        if self.least is not None and value < self.least:
            return f"at least {self.least}"
        if self.above is not None and value <= self.above:
            return f"above {self.above}"
        if self.below is not None and value >= self.below:
            return f"below {self.below}"
        return f"at most {self.most}" if self.most is not None and value > self.most else ""


Count = Annotated[int, Range(least=1, most=LARGEST)]
CountOrZero = Annotated[int, Range(least=0, most=LARGEST)]
CountOrAll = Annotated[int, Range(least=-1, most=LARGEST)]  # -1 for all
Length = Annotated[int, Range(least=1, most=2**20)]  # tokens of a text
RowLength = Annotated[int, Range(least=2, most=2**20)]
BatchSize = Annotated[int, Range(least=1, most=2**16)]
Seed = Annotated[int, Range(least=0, most=LARGEST)]
Rate = Annotated[float, Range(least=0, below=1)]
Share = Annotated[float, Range(above=0, most=1)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(least=0)]

_IN_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "None"}


def check(instance: Any):
    """Raises UserError where a field of a dataclass has a value of another type or out of its range."""
    check_values(type(instance), vars(instance))


def check_values(cls: type, values: Mapping[str, Any], names: Mapping[str, str] | None = None):
    """As `check`, of values by the names of a dataclass's fields; `names` has those that errors say in their place."""
    types = typing.get_type_hints(cls, include_extras=True)
    for name, value in values.items():
        check_value((names or {}).get(name, name), value, types[name])


def check_value(name: str, value: Any, kind: Any):
    """Raises UserError if a value is not of a type, one of those above or a plain one."""
    ranges = getattr(kind, "__metadata__", (Range(),))
    kind = getattr(kind, "__origin__", kind) if hasattr(kind, "__metadata__") else kind
    kinds = [typing.get_origin(one) or one for one in typing.get_args(kind) or (kind,)]
    if not any(_is_a(value, one) for one in kinds):
        wanted = " or ".join(_IN_WORDS.get(one, f"a {one.__name__}") for one in kinds)
        raise UserError(f"{name}={repr(value)[:80]} must be {wanted}.")
    if isinstance(value, numbers.Real) and not isinstance(value, bool) and (broken := ranges[0].broken_by(value)):
        raise UserError(f"{name}={value} must be {broken}.")


def _is_a(value: Any, kind: type) -> bool:
    if kind in (int, float):  # NumPy's numbers as well, and 1 where 1.0 is meant
        return isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    return isinstance(value, kind)
