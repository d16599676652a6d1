"""Rows a step: how many, in how many parts, and where they lie."""

import dataclasses

import jax
import numpy as np
import pytest

from transformer_lm import recipe
from transformer_lm.configs import base
from transformer_lm.errors import UserError
from transformer_lm.training import batching, sharding


def plan(devices: int, *, fsdp: int = 1, tensor: int = 1, before: dict | None = None, **fields) -> batching.Batching:
    mesh = jax.sharding.AbstractMesh((devices // fsdp // tensor, fsdp, tensor), ("data", "fsdp", "tensor"))
    config = dataclasses.replace(recipe.read(base.get_config()).train, per_device_batch_size=4, **fields)
    return batching.plan(config, sharding.Layout(mesh), **before or {})


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_the_rows_of_a_run_stay_what_they_were(devices):
    """Begun on eight devices; elsewhere a device has no more rows at a time than there."""
    begun = plan(8)
    assert (begun.rows, begun.accumulation) == (32, 1)
    later = plan(devices, before={"rows": begun.rows, "eval_rows": begun.counted_eval_rows})
    assert (later.rows, later.accumulation) == (32, 8 // devices)
    assert later.max_eval_rows == begun.max_eval_rows


def test_a_global_batch_goes_before_what_was_before():
    assert plan(2, global_batch_size=24, before={"rows": 8, "eval_rows": 8}).rows == 24
    assert plan(4, tensor=4, gradient_accumulation_steps=2).rows == 16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"devices": 8, "global_batch_size": 20}, "global_batch_size=16 or 24"),
        ({"devices": 2, "gradient_accumulation_steps": 3}, "global_batch_size=6 or 12, .* one of 1, 2, 4, 8"),
        ({"devices": 3, "before": {"rows": 32, "eval_rows": 32}}, "A step of 32 rows does not divide by 3 device"),
    ],
)
def test_what_cannot_be_divided_says_what_can(arguments, words):
    with pytest.raises(UserError, match=words):
        plan(**arguments)


def test_a_batch_comes_to_lie_on_the_devices_as_it_was():
    layout = sharding.make_layout(1, 1)
    batch = {"inputs": np.arange(12).reshape(4, 3), "bytes": np.arange(4)}
    assert batching.rows_here(layout, 4).tolist() == [0, 1, 2, 3]
    jax.tree.map(np.testing.assert_array_equal, batching.place(layout, 4, batch), batch)
