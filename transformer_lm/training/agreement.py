"""What all processes of a run know alike, so that they do the same after the same step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from transformer_lm.training.sharding import Layout


class AnyProcess:
    """Whether something is so in any process of the run.

    Every process asks equally often. Where there are several they hear what was so when they asked before, since none
    waits for the others.
    """

    def __init__(self, is_so: Callable[[], bool], layout: Layout):
        """`is_so` says whether it is so in this process."""
        self._is_so = is_so
        self._alone = jax.process_count() == 1
        self._asked: jax.Array | None = None
        self._one_a_device = NamedSharding(layout.mesh, PartitionSpec(layout.mesh.axis_names))
        self._any = jax.jit(jnp.any, out_shardings=layout.sharding())

    def __call__(self) -> bool:
        """Asks."""
        if self._alone:
            return self._is_so()
        before, self._asked = self._asked, self._ask()
        return before is not None and bool(before)

    def _ask(self) -> jax.Array:
        devices = self._one_a_device.mesh.size
        mine = np.array([self._is_so()])
        return self._any(jax.make_array_from_callback((devices,), self._one_a_device, lambda _: mine))

    def forget(self):
        """In every process alike: what was asked counts no more."""
        self._asked = None
