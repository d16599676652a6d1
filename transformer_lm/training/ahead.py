"""A recipe's step of training, compiled for devices that need not be at hand, and what it takes there."""

import collections
import dataclasses
import math
import os
import re

import jax
from jax.experimental import topologies

from transformer_lm import attention, axes
from transformer_lm.errors import UserError
from transformer_lm.extras import optional_import
from transformer_lm.training import batching, optimizers, sharding
from transformer_lm.training.config import LESS_MEMORY, Recipe
from transformer_lm.training.flops import PEAK_FLOPS, flops_per_token
from transformer_lm.training.state import abstract_state
from transformer_lm.training.step import abstract_arguments, jit_train_step

GIB = 2**30
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
ONLY_TO_COMPILE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it takes no TPU from another process
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
# GiB of one device's memory that libtpu gives to programs; by jax.Device.device_kind.
MEMORY = {
    "TPU v2": 7.48, "TPU v3": 15.48, "TPU v4": 30.75, "TPU v5 lite": 15.75, "TPU v5": 95.74, "TPU v6 lite": 31.25,
    "TPU7x": 94.75,
}  # fmt: skip
SHARE = 0.4  # of the makers' peak, that a run's time is reckoned with


def devices_of(topology: str) -> list[jax.Device]:
    """The devices of a topology, as far as a compiler needs them; to be called before JAX is asked for any other.

    Args:
      topology: of TPUs, as libtpu calls it, like "v3:2x2" (a v3-8) or "v5e:4x4"; "cpu:8" for so many CPU devices; ""
        for the devices at hand.

    Raises:
      UserError: there is no such, or libtpu is not installed.
    """
    if not topology:
        return jax.devices()
    if not re.fullmatch(r"cpu:[1-9]\d{0,3}|(v|tpu)\d\w*:[1-9]\d{0,3}(x[1-9]\d{0,3}){0,2}", topology):
        raise UserError(f"--topology={topology} must be like v5e:2x4 or cpu:8: a kind of TPU, or cpu, and how many.")
    kind, _, sides = topology.partition(":")
    jax.config.update("jax_platforms", "cpu")  # what is at hand is left alone
    if kind == "cpu":
        jax.config.update("jax_num_cpu_devices", int(sides))
        return jax.devices()
    return _tpus(topology, kind, [int(side) for side in sides.split("x")])


def set_up_libtpu():
    """Tells libtpu what it would else ask of Google Cloud, and complain of not finding: it is only to compile."""
    for name, value in ONLY_TO_COMPILE.items():
        os.environ.setdefault(name, value)


def _tpus(topology: str, kind: str, sides: list[int]) -> list[jax.Device]:
    optional_import("libtpu", "tpu", f"--topology={topology}")
    set_up_libtpu()
    options = {"chip_config_name": "megacore"} if kind == "v4" else {}  # two cores as one device, as JAX takes them
    if math.prod(sides) < 4:  # less than a whole host
        options["chips_per_host_bounds"] = [*sides, 1, 1][:3]
    try:
        return list(topologies.get_topology_desc(topology, "tpu", **options).devices)
    except Exception as error:
        raise UserError(
            f"--topology={topology}: libtpu does not compile for it ({' '.join(str(error).split())})."
        ) from error


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a step takes.

    Attributes:
      layout: the devices.
      batching: rows.
      state: bytes of a device for parameters, optimizer and batch.
      work: bytes of a device for all that is made on the way.
      collectives: {kind: how many are in the program}, in which a loop's are counted once.
      kernels: fused kernels in it.
      flops: of the model a step, over all devices.
      steps: of the run.
    """

    layout: sharding.Layout
    batching: batching.Batching
    state: int
    work: int
    collectives: dict[str, int]
    kernels: int
    flops: float
    steps: int

    @property
    def _memory(self) -> str:
        state, work = self.state / GIB, self.work / GIB
        return f"{state:.2f} GiB of state + {work:.2f} GiB of work = {state + work:.2f} GiB"

    def check(self):
        """Raises UserError where a device has less memory than the step takes: compilers look at the work alone."""
        kind = self.layout.device.device_kind
        if self.state + self.work > MEMORY.get(kind, math.inf) * GIB:
            raise UserError(
                f"A step takes {self._memory} of each device, and a {kind} has {MEMORY[kind]}; lower {LESS_MEMORY}."
            )

    def __str__(self) -> str:
        """A few lines for people."""
        talk = ", ".join(f"{number} {kind}" for kind, number in self.collectives.items()) or "none"
        lines = [
            f"devices: {self.layout} of kind {self.layout.device.device_kind}",
            f"batch: {self.batching}",
            f"memory of a device: {self._memory}",
            f"collectives in the program: {talk}",
            f"fused kernels in the program: {self.kernels}",
            f"model: {self.flops:.3g} FLOP a step, {self.steps} steps",
        ]
        if peak := PEAK_FLOPS.get(self.layout.device.device_kind):
            seconds = self.flops / (SHARE * peak * self.layout.mesh.size)
            lines.append(
                f"time, if {SHARE:.0%} of the makers' peak is reached: {seconds:.3g} s a step, "
                f"{seconds * self.steps / 3600:.3g} hours"
            )
        return "\n".join(lines)


def trace_step(recipe: Recipe, layout: sharding.Layout, batches: batching.Batching) -> jax.stages.Traced:
    """The recipe's step, of abstract arrays."""
    optimizer = optimizers.make_optimizer(recipe.optimizer)
    state = abstract_state(recipe.network, optimizer, layout)
    step = jit_train_step(
        recipe.network, optimizer, recipe.train.label_smoothing, state,
        layout=layout, accumulation=batches.accumulation,
    )  # fmt: skip
    return step.trace(*abstract_arguments(state, layout, batches.rows, recipe.data.max_target_length))


def compile_step(recipe: Recipe, devices: list[jax.Device]) -> Needs:
    """Compiles a recipe's step for devices; the tokenizer is taken to be as large as the recipe wants it.

    Raises:
      UserError: the devices cannot be the recipe's mesh, or share its step.
    """
    layout = sharding.make_layout(recipe.train.mesh_fsdp, recipe.train.mesh_tensor, devices)
    layout.check(recipe.network)
    length = recipe.data.max_target_length
    with axes.laid_out(layout):
        attention.check_rows(recipe.network.attention, recipe.network.head_size, [length])
    batches = batching.plan(recipe.train, layout)
    compiled = trace_step(recipe, layout, batches).lower().compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    found = collections.Counter(re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", text))
    return Needs(
        layout=layout,
        batching=batches,
        state=memory.argument_size_in_bytes,
        work=memory.temp_size_in_bytes,
        collectives={kind: found[kind] for kind in COLLECTIVES if found[kind]},
        kernels=len(re.findall(r'custom_call_target="(?:tpu_custom_call|__gpu\$xla\.gpu\.triton|__cudnn\$fmha)', text)),
        flops=flops_per_token(recipe.network, length) * batches.rows * length,
        steps=recipe.train.num_train_steps,
    )
