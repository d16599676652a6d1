"""How many rows a step has, in how many parts they are computed, and which of them each process reads."""

import dataclasses
import functools

import jax
import numpy as np

from transformer_lm.data.input_pipeline import Batch
from transformer_lm.errors import UserError
from transformer_lm.training.config import TrainConfig
from transformer_lm.training.sharding import Layout


@dataclasses.dataclass(frozen=True)
class Batching:
    """Rows of a step, over all devices of all processes.

    Attributes:
      rows: of a training step.
      accumulation: parts in which the step's gradient is summed up, one after the other.
      eval_rows: of an evaluation's batch on these devices.
      counted_eval_rows: of a batch as num_eval_steps counts them, on the devices that the run began on.
      max_eval_rows: of an evaluation; -1 for all.
    """

    rows: int
    accumulation: int
    eval_rows: int
    counted_eval_rows: int
    max_eval_rows: int

    def __str__(self) -> str:
        """Like "32 rows a step in 2 parts"."""
        return f"{self.rows} rows a step" + (f" in {self.accumulation} parts" if self.accumulation > 1 else "")


def plan(config: TrainConfig, layout: Layout, *, rows: int = 0, eval_rows: int = 0) -> Batching:
    """What a run's fields mean on these devices.

    Args:
      config: the run.
      layout: the devices.
      rows, eval_rows: of a step and of an evaluation's batch, as the run had them before, perhaps elsewhere; 0 if new.

    Raises:
      UserError: the rows cannot be divided as asked.
    """
    devices, ways = layout.mesh.size, layout.ways("batch")
    rows = config.global_batch_size or rows or config.per_device_batch_size * devices
    accumulation = config.gradient_accumulation_steps or _parts(rows, ways, config.per_device_batch_size * devices)
    unit = ways * accumulation
    if rows % unit:
        possible = " or ".join(str(number) for number in (rows // unit * unit, (rows // unit + 1) * unit) if number)
        raise UserError(
            f"A step of {rows} rows does not divide by {ways} device(s) x gradient_accumulation_steps={accumulation}: "
            f"take global_batch_size={possible}, or a number of devices and accumulation steps whose product is one "
            f"of {', '.join(str(number) for number in range(1, rows + 1) if rows % number == 0)}."
        )
    here, most = plan_evaluation(config, layout, eval_rows)
    return Batching(rows, accumulation, here, eval_rows or here, most)


def plan_evaluation(config: TrainConfig, layout: Layout, counted: int = 0) -> tuple[int, int]:
    """Rows of an evaluation's batch on these devices, and of all of it (-1: every one).

    Args:
      config: the run.
      layout: the devices.
      counted: rows of a batch as num_eval_steps counts them; 0 for those on these devices.
    """
    here = (config.eval_per_device_batch_size or config.per_device_batch_size) * layout.mesh.size
    return here, -1 if config.num_eval_steps < 0 else config.num_eval_steps * (counted or here)


def _parts(rows: int, ways: int, at_once: int) -> int:
    """The fewest parts of at most `at_once` rows that are spread evenly; too few where there are none."""
    wanted = -(-rows // at_once)
    return next((parts for parts in range(wanted, rows // ways + 1) if rows % (ways * parts) == 0), wanted)


@functools.cache
def rows_here(layout: Layout, rows: int) -> np.ndarray:
    """The numbers of a batch's rows that lie on this process's devices."""
    parts = layout.sharding("batch").addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[part] for part in parts]))


def place(layout: Layout, rows: int, batch: Batch) -> dict[str, jax.Array]:
    """The batch on all devices, of which every process gives those of its rows that `rows_here` names."""
    here = rows_here(layout, rows)

    def whole(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            first, stop, _ = index[0].indices(rows)
            return array[slice(*np.searchsorted(here, (first, stop)))]

        return jax.make_array_from_callback((rows, *array.shape[1:]), layout.sharding("batch"), part)

    return {name: whole(array) for name, array in batch.items()}
