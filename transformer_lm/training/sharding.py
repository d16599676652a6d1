"""The device mesh, and who lies where on it.

All devices stand in one row, the mesh axis "data": each holds the whole model and works on its part of the batch.
Which array is cut along which axis is said here and nowhere else.
"""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh() -> Mesh:
    """All local devices along the axis "data"."""
    devices = jax.local_devices()
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of parameters, optimizer state and metrics: a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of batches [B, ...]: rows spread over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))
