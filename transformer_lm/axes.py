"""Names of arrays' axes: the network says them, and whoever runs it says where on which devices they lie.

The names are those of the configuration's fields ("emb_dim", "num_heads", ...) and "batch". Nothing is laid out, and
nothing named here has an effect, unless a function is traced within `laid_out`.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax

from transformer_lm.errors import UserError

Names = tuple[str | None, ...]  # of an array's axes, from the first on; None for one that is never cut


class Layout(Protocol):
    """Where arrays lie; `transformer_lm.training.sharding` has one."""

    @property
    def device(self) -> jax.Device:
        """One of the devices, which are all alike."""

    def place(self, x: Any, names: Names) -> Any:
        """x, laid out by the names of its axes."""

    def ways(self, name: str) -> int:
        """In how many parts an axis is cut."""

    def by_device(self, function: Callable, inputs: tuple[Names, ...], output: Names) -> Callable:
        """The function, run by each device on its part of the arrays."""


_LAYOUT: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def laid_out(layout: Layout | None) -> Iterator[None]:
    """Arrays that are named while a function is traced here lie where the layout says."""
    token = _LAYOUT.set(layout)
    try:
        yield
    finally:
        _LAYOUT.reset(token)


def check_devices():
    """Raises UserError where JAX has none, as when JAX_PLATFORMS asks for what is not there."""
    try:
        jax.devices()
    except Exception as error:  # of every kind
        raise UserError(
            f"JAX finds no devices (JAX_PLATFORMS={jax.config.jax_platforms}): {type(error).__name__} "
            f"{' '.join(str(error).split())}. Install what they need (the extra cuda or tpu), or unset it."
        ) from error


def device() -> jax.Device:
    """A device like those that a function is traced for, which need not be at hand: a compiler is enough."""
    layout = _LAYOUT.get()
    return jax.devices()[0] if layout is None else layout.device


def named(x: Any, *names: str | None) -> Any:
    """x, whose axes have these names."""
    layout = _LAYOUT.get()
    return x if layout is None else layout.place(x, names)


def ways(name: str) -> int:
    """In how many parts an axis of this name is cut."""
    layout = _LAYOUT.get()
    return 1 if layout is None else layout.ways(name)


def by_device(function: Callable, inputs: tuple[Names, ...], output: Names) -> Callable:
    """The function, which works on each part of its arrays alone, as kernels do that the compiler cannot divide."""
    layout = _LAYOUT.get()
    return function if layout is None else layout.by_device(function, inputs, output)
