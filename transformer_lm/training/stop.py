"""How a run of one or several processes comes to stop."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from transformer_lm.training.sharding import Layout
from transformer_lm.training.signals import Signals, Stopped

Result = TypeVar("Result")


class Stop:
    """Whether the run is to stop: upon a signal to any of its processes, agreed upon by all."""

    def __init__(self, signals: Signals, layout: Layout):
        self._signals = signals
        self._agreed = False
        self._alone = jax.process_count() == 1
        self._asked: jax.Array | None = None
        mesh = layout.mesh
        self._one_a_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(jnp.any, out_shardings=layout.sharding())

    @property
    def agreed(self) -> bool:
        """Whether it is to stop, without asking again."""
        return self._signals.caught is not None if self._alone else self._agreed

    def __call__(self) -> bool:
        """Whether to stop now. All processes ask equally often; they hear what was so when they asked before."""
        if not self._alone:
            before, self._asked = self._asked, self._ask()
            self._agreed = self._agreed or (before is not None and bool(before))
        return self.agreed

    def _ask(self) -> jax.Array:
        def mine(_):
            return np.array([self._signals.caught is not None])

        devices = self._one_a_device.mesh.size
        return self._any(jax.make_array_from_callback((devices,), self._one_a_device, mine))

    def unless(self, work: Callable[[], Result]) -> Result:
        """What `work` returns; raises Stopped when the run is to stop.

        Where the run has several processes they finish the work together, in which they may ask whether to stop.
        """
        if self._alone:
            return self._signals.listening(work)
        result = work()
        if self():
            raise Stopped
        return result
