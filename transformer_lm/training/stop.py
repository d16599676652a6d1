"""How a run of one or several processes comes to stop."""

from collections.abc import Callable
from typing import TypeVar

import jax

from transformer_lm.training.agreement import AnyProcess
from transformer_lm.training.sharding import Layout
from transformer_lm.training.signals import Signals, Stopped

Result = TypeVar("Result")


class Stop:
    """Whether the run is to stop: upon a signal to any of its processes, agreed upon by all."""

    def __init__(self, signals: Signals, layout: Layout):
        self._signals = signals
        self._agreed = False
        self._alone = jax.process_count() == 1
        self._any_is_told = AnyProcess(lambda: signals.caught is not None, layout)

    @property
    def agreed(self) -> bool:
        """Whether it is to stop, without asking again."""
        return self._signals.caught is not None if self._alone else self._agreed

    def __call__(self) -> bool:
        """Whether to stop now. All processes ask equally often."""
        if self._any_is_told():
            self._agreed = True
        return self.agreed

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
