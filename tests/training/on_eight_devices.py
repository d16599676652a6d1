"""What tests of sharding run, in a process of eight devices: twenty steps on each mesh, and the compiled texts.

python on_eight_devices.py WORKDIR, an empty folder.
"""

import contextlib
import dataclasses
import json
import re
import sys
import types
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from transformer_lm import axes, flash_attention, models, recipe
from transformer_lm.checkpoints import store
from transformer_lm.configs import base
from transformer_lm.training import ahead, batching, optimizers, sharding
from transformer_lm.training.config import Recipe
from transformer_lm.training.state import TrainState, abstract_state, state_of
from transformer_lm.training.step import jit_train_step, make_eval_step

ROWS, LENGTH = 16, 12
NETWORK = {"vocab_size": 64, "emb_dim": 16, "num_heads": 4, "num_layers": 2, "qkv_dim": 16, "mlp_dim": 96}
MODERN = {
    "norm": "rms", "positions": "rope", "mlp": "swiglu", "qk_norm": True, "use_bias": False, "num_kv_heads": 2,
}  # fmt: skip
MUON = {"optimizer": "muon", "schedule": "wsd", "num_train_steps": 60}
# Fields of the network and of the optimizer, and the meshes that they are tried on.
FAMILIES = {
    "the original's": ({}, {}, ("single", "data", "fsdp", "tensor", "mixed in parts")),
    "modern": (MODERN, MUON, ("single", "fsdp", "mixed in parts", "kernels for GPUs")),
}
# Devices, fsdp, tensor, accumulation, and fields of the network.
MESHES = {
    "single": (1, 1, 1, 1, {}),
    "data": (8, 1, 1, 1, {}),
    "fsdp": (8, 8, 1, 1, {}),
    "tensor": (4, 1, 4, 1, {}),
    "mixed in parts": (8, 2, 2, 4, {"remat": "block"}),
    "kernels for GPUs": (8, 2, 2, 1, {"attention": "triton"}),
}


def batch_of(step: int) -> dict[str, np.ndarray]:
    """Rows of unequal numbers of tokens."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(3, NETWORK["vocab_size"], (ROWS, LENGTH), np.int32)
    segments = (np.arange(LENGTH) < rng.integers(2, LENGTH, (ROWS, 1))).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    counts = {"characters": np.ones(ROWS, np.int32), "bytes": np.ones(ROWS, np.int32)}
    places = {"segments": segments, "positions": positions, "scored": segments > 0}
    return {"inputs": tokens, "targets": tokens, **places, **counts}


def largest_results(text: str) -> dict[str, int]:
    """{kind of collective: elements of the largest result of such} in a compiled program."""
    found: dict[str, int] = {}
    for shape, kind in re.findall(r"= \(?(\w+\[[\d,]*\]).*? (all-gather|all-reduce|reduce-scatter|all-to-all)\(", text):
        size = int(np.prod([int(n) for n in re.findall(r"\d+", shape.partition("[")[2])] or [1]))
        found[kind] = max(found.get(kind, 0), size)
    return found


class Run:
    """A run on a mesh, compiled."""

    def __init__(self, network: dict, optimizer: dict, mesh: str):
        devices, fsdp, tensor, accumulation, fields = MESHES[mesh]
        self._network = models.TransformerConfig(**NETWORK | network | fields)
        self._optimizer = optimizers.make_optimizer(optimizers.OptimizerConfig(0.01, 2, 0.1, **optimizer))
        self._layout = sharding.make_layout(fsdp, tensor, jax.devices()[:devices])
        self._layout.check(self._network)
        self.abstract = abstract_state(self._network, self._optimizer, self._layout)
        self._key = jax.device_put(jax.random.key(1), self._layout.sharding())
        step = jit_train_step(
            self._network, self._optimizer, 0.1, self.abstract, layout=self._layout, accumulation=accumulation
        )
        self._compiled = step.lower(self.abstract, self._batch(0), self._key).compile()

    def _batch(self, step: int) -> dict[str, jax.Array]:
        return batching.place(self._layout, ROWS, batch_of(step))

    def steps(self, state: TrainState) -> tuple[TrainState, list[float]]:
        """The state after twenty more steps with dropout, and their losses."""
        losses = []
        for number in range(int(state.step), int(state.step) + 20):
            state, metrics = self._compiled(state, self._batch(number), self._key)
            losses.append(float(metrics["loss"]))
        return state, losses

    def from_the_beginning(self) -> tuple[TrainState, dict]:
        """The state after twenty steps; their losses, an evaluation, what the compiled step and its devices hold."""
        placement = jax.tree.map(lambda x: x.sharding, self.abstract)
        network = dataclasses.replace(self._network, remat="none", attention="auto")  # as for all meshes
        params = jax.jit(models.init, static_argnums=0)(network, jax.random.key(0))
        state = jax.device_put(state_of(params, self._optimizer), placement)
        state, losses = self.steps(state)
        kernel = state.params["blocks"]["mlp"]["wi"]["kernel"]
        totals = jax.jit(make_eval_step(self._network, self._layout))(state.params, self._batch(0))
        return state, {
            "losses": losses,
            "eval": {name: float(value) for name, value in totals.items()},
            "collectives": largest_results(self._compiled.as_text()),
            "share": kernel.addressable_shards[0].data.size / kernel.size,
        }

    def restored(self, saved: store.Checkpoints, expected: TrainState) -> dict:
        """Whether a checkpoint comes back bit for bit, and the losses of twenty steps from there."""
        target = self.abstract
        progress = {"step": target.step, "totals": target.totals}
        params, opt_state, progress = saved.restore(target.params, target.opt_state, progress)
        state = TrainState(progress["step"], params, opt_state, progress["totals"])
        same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.asarray(x).tobytes() == y.tobytes(), state, expected)
        return {"same bits": jax.tree.all(same), "losses": self.steps(state)[1]}


def recipe_of(name: str, **fields) -> Recipe:
    """A recipe with some fields changed."""
    config = recipe.load(str(Path(base.__file__).with_name(f"{name}.py"))).unlock()
    config.update(fields)
    return recipe.read(config)


def step_of(name: str, **fields) -> jax.stages.Traced:
    """The step of a recipe with some fields changed, of abstract arrays."""
    chosen = recipe_of(name, **fields)
    layout = sharding.make_layout(chosen.train.mesh_fsdp, chosen.train.mesh_tensor)
    return ahead.trace_step(chosen, layout, batching.plan(chosen.train, layout))


def bytes_of_the_largest_recipe() -> int:
    """What a step of japanese_1.0b_v1 takes on each of eight devices in fsdp; compiled, not run."""
    needs = ahead.compile_step(recipe_of("japanese_1.0b_v1", mesh_fsdp=8, remat="block"), jax.devices())
    return needs.state + needs.work


def kernels_for_tpus() -> int:
    """How many of the TPU's own kernels are in a step of japanese_0.1b_v2 on 2 x 2 x 2 of them; translated, not run."""
    step = step_of("japanese_0.1b_v2", mesh_fsdp=2, mesh_tensor=2, attention="tpu", num_kv_heads=4)
    return step.lower(lowering_platforms=("tpu",)).as_text().count("@tpu_custom_call")


def kernels_for_gpus() -> int | None:
    """As for TPUs, of this project's kernels in a step of japanese_0.1b_v1, with dropout; None if JAX needs a GPU."""
    with mock.patch.object(axes, "device", return_value=types.SimpleNamespace(platform="gpu")):
        step = step_of("japanese_0.1b_v1", mesh_fsdp=2, mesh_tensor=2, attention="triton")
        try:
            return step.lower(lowering_platforms=("cuda",)).as_text().count("custom_call @__gpu$xla.gpu.triton")
        except RuntimeError as error:  # of JAX 0.11 and later, on a mesh
            if "No supported GPU devices" not in str(error):
                raise
            return None


def run_family(workdir: Path, network: dict, optimizer: dict, meshes: tuple[str, ...]) -> dict:
    """Every mesh from the beginning; then from the checkpoint that fsdp has saved, which goes on as it is, too."""
    runs = {mesh: Run(network, optimizer, mesh) for mesh in meshes}
    results = {}
    for mesh, run in runs.items():
        state, results[mesh] = run.from_the_beginning()
        if mesh == "fsdp":
            saved_state = state
    with contextlib.closing(store.Checkpoints(workdir)) as saved:
        progress = {"step": saved_state.step, "totals": saved_state.totals}
        saved.save(20, saved_state.params, saved_state.opt_state, progress)
        saved.wait()
        expected = jax.device_get(saved_state)
        unbroken = runs["fsdp"].steps(saved_state)[1]
        for mesh, run in runs.items():
            results[mesh]["restored"] = run.restored(saved, expected)
    return results | {"unbroken": unbroken}


def main(workdir: str):
    """Prints what is found, as JSON."""
    kernels = {"tpu": kernels_for_tpus(), "gpu": kernels_for_gpus()}
    flash_attention.INTERPRET = True
    results = {name: run_family(Path(workdir) / name, *family) for name, family in FAMILIES.items()}
    print(json.dumps(results | {"bytes": bytes_of_the_largest_recipe(), "kernels": kernels}))


if __name__ == "__main__":
    main(sys.argv[1])
