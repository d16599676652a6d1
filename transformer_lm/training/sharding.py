"""The device mesh, and who lies where on it: which axis of an array is cut along which axis of the mesh.

Mesh axes: "data" (each part has rows of its own), "fsdp" (rows of its own, and a part of every matrix, which the
others are handed when they need it: fully sharded data parallelism, ZeRO stage 3) and "tensor" (heads, hidden units
and vocabulary are divided; Megatron-LM's way).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from transformer_lm import models
from transformer_lm.axes import Names
from transformer_lm.errors import UserError

RULES = {
    "batch": ("data", "fsdp"),
    "emb_dim": "fsdp",
    "num_heads": "tensor",
    "kv_heads": "tensor",
    "mlp_dim": "tensor",
    "vocab_size": "tensor",
    "longer_side": "fsdp",  # of a matrix that Muon makes orthogonal
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and the rules for what lies where on it."""

    mesh: Mesh

    @property
    def device(self) -> jax.Device:
        """One of the devices, which are all alike."""
        return self.mesh.devices.flat[0]

    def sharding(self, *names: str | None) -> NamedSharding:
        """Of an array whose axes have these names; without names a whole copy on every device."""
        return NamedSharding(self.mesh, PartitionSpec(*(RULES.get(name) for name in names)))

    def place(self, x: jax.Array, names: Names) -> jax.Array:
        """x, laid out by the names of its axes; in a function that is traced. What does not divide stays whole."""
        names = tuple(
            name if name and size % self.ways(name) == 0 else None for name, size in zip(names, x.shape, strict=True)
        )
        return jax.lax.with_sharding_constraint(x, self.sharding(*names))

    def by_device(self, function: Callable, inputs: tuple[Names, ...], output: Names) -> Callable:
        """The function, run by each device on its part of the arrays."""
        specs = tuple(self.sharding(*names).spec for names in inputs)
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=specs, out_specs=self.sharding(*output).spec, check_vma=False
        )

    def ways(self, name: str) -> int:
        """In how many parts an axis is cut."""
        axes = RULES[name] if isinstance(RULES[name], tuple) else (RULES[name],)
        return int(np.prod([self.mesh.shape[axis] for axis in axes]))

    def of_state(self, tree: Any) -> Any:
        """The shardings of parameters, or of all that has arrays like them at paths that end alike, as optimizers."""
        return jax.tree_util.tree_map_with_path(self._of_leaf, tree)

    def _of_leaf(self, path: tuple, leaf: Any) -> NamedSharding:
        keys = tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
        names = models.PARAMETER_AXES.get(keys[-2:], ())
        stacked = (None,) * (leaf.ndim - len(names))
        return self.sharding(*stacked, *names) if len(names) <= leaf.ndim else self.sharding()

    def spread(self, tree: Any) -> Any:
        """Arrays that every process has whole, each of its part of them on its devices, as `of_state` says.

        `jax.device_put` would gather those of all processes on every device, to see whether they are the same.
        """

        def whole(array: np.ndarray, place: NamedSharding) -> jax.Array:
            array = np.asarray(array)
            return jax.make_array_from_callback(array.shape, place, lambda index: array[index])

        return jax.tree.map(whole, tree, self.of_state(tree))

    def __str__(self) -> str:
        """Like "8 device(s) (data 4, tensor 2)"."""
        parts = ", ".join(f"{name} {size}" for name, size in self.mesh.shape.items() if size > 1)
        return f"{self.mesh.size} device(s)" + (f" ({parts})" if parts else "")

    def check(self, network: models.TransformerConfig):
        """Raises UserError where a size of the network does not divide by the parts that it is cut into."""
        for name, axis in RULES.items():
            if getattr(network, name, 0) % self.ways(name):
                field = {"kv_heads": "num_kv_heads"}.get(name, name)
                raise UserError(
                    f"{field}={getattr(network, name)} does not divide by mesh_{axis}={self.ways(name)}; "
                    "change one of the two."
                )


def make_layout(fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None) -> Layout:
    """All devices of all processes, or those given, as a mesh, whose axis "data" takes what the other two leave.

    Raises:
      UserError: the number of devices does not divide by them, or their wires allow no such mesh.
    """
    devices = list(devices or jax.devices())
    if len(devices) % (fsdp * tensor):
        raise UserError(
            f"{len(devices)} device(s) do not divide by mesh_fsdp={fsdp} x mesh_tensor={tensor}; choose numbers whose "
            "product divides the devices."
        )
    shape = (len(devices) // (fsdp * tensor), fsdp, tensor)
    try:
        arranged = arrange(devices, shape)
    except (ValueError, NotImplementedError) as error:
        raise UserError(
            f"{len(devices)} devices of kind {devices[0].device_kind} cannot be a mesh of data {shape[0]} x mesh_fsdp="
            f"{fsdp} x mesh_tensor={tensor}; choose others of the two ({str(error).splitlines()[0]})."
        ) from error
    return Layout(Mesh(arranged, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3))


def arrange(devices: Sequence[jax.Device], shape: tuple[int, int, int]) -> np.ndarray:
    """The devices [data, fsdp, tensor], so that those that talk most are neighbours by their wires.

    GPUs lie in their order, so that nodes are parts of "data"; so are the slices of a TPU run over several.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if slices > 1:
        data, *others = shape
        if data % slices:
            raise ValueError(f"{slices} slices of a pod do not divide data")
        within, between = (data // slices, *others), (slices, 1, 1)
        return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
