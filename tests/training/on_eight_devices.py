"""What tests of sharding run, in a process of eight devices: twenty steps on each mesh, and the compiled texts."""

import json
import re
from pathlib import Path

import jax
import numpy as np

from transformer_lm import models, recipe
from transformer_lm.configs import base
from transformer_lm.training import batching, optimizers, sharding
from transformer_lm.training.state import init_state
from transformer_lm.training.step import ROWS as ROW_ARRAYS
from transformer_lm.training.step import make_eval_step, make_train_step

ROWS, LENGTH = 16, 12
NETWORK = {"vocab_size": 64, "emb_dim": 16, "num_heads": 4, "num_layers": 2, "qkv_dim": 16, "mlp_dim": 32}
# Devices, fsdp, tensor, accumulation, and fields of the network.
CASES = {
    "single": (1, 1, 1, 1, {}),
    "data": (8, 1, 1, 1, {}),
    "fsdp": (8, 8, 1, 1, {}),
    "tensor": (4, 1, 4, 1, {}),
    "mixed in parts": (8, 2, 2, 4, {"remat": "block"}),
}


def batch_of(step: int) -> dict[str, np.ndarray]:
    """Rows of unequal numbers of tokens."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(3, NETWORK["vocab_size"], (ROWS, LENGTH), np.int32)
    segments = (np.arange(LENGTH) < rng.integers(2, LENGTH, (ROWS, 1))).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    counts = {"characters": np.ones(ROWS, np.int32), "bytes": np.ones(ROWS, np.int32)}
    return {"inputs": tokens, "targets": tokens, "segments": segments, "positions": positions} | counts


def largest_results(text: str) -> dict[str, int]:
    """{kind of collective: elements of the largest result of such} in a compiled program."""
    found: dict[str, int] = {}
    for shape, kind in re.findall(r"= \(?(\w+\[[\d,]*\]).*? (all-gather|all-reduce|reduce-scatter|all-to-all)\(", text):
        size = int(np.prod([int(n) for n in re.findall(r"\d+", shape.partition("[")[2])] or [1]))
        found[kind] = max(found.get(kind, 0), size)
    return found


def run(devices: int, fsdp: int, tensor: int, accumulation: int, fields: dict) -> dict:
    """Losses of twenty steps with dropout, an evaluation, and what the compiled step and its devices hold."""
    network = models.TransformerConfig(**NETWORK | fields)
    optimizer = optimizers.make_optimizer(optimizers.OptimizerConfig(0.01, 2, 0.1))
    layout = sharding.make_layout(fsdp, tensor, jax.devices()[:devices])
    layout.check(network)
    abstract = jax.eval_shape(lambda: init_state(network, optimizer, jax.random.key(0)))
    placement = layout.of_state(abstract)
    state = jax.device_put(init_state(network, optimizer, jax.random.key(0)), placement)
    step = make_train_step(network, optimizer, 0.1, layout=layout, accumulation=accumulation)
    step = jax.jit(step, donate_argnums=0, out_shardings=(placement, layout.sharding()))
    key = jax.device_put(jax.random.key(1), layout.sharding())
    batches = [batching.place(layout, ROWS, batch_of(number)) for number in range(20)]
    compiled = step.lower(state, batches[0], key).compile()
    losses = []
    for batch in batches:
        state, metrics = compiled(state, batch, key)
        losses.append(float(metrics["loss"]))
    kernel = state.params["blocks"]["mlp"]["wi"]["kernel"]
    totals = jax.jit(make_eval_step(network, layout))(state.params, batches[0])
    return {
        "losses": losses,
        "eval": {name: float(value) for name, value in totals.items()},
        "collectives": largest_results(compiled.as_text()),
        "share": kernel.addressable_shards[0].data.size / kernel.size,
    }


def bytes_of_the_largest_recipe() -> int:
    """What a step of japanese_1.0b_v1 takes on each of eight devices in fsdp; compiled, not run."""
    config = recipe.load(str(Path(base.__file__).with_name("japanese_1.0b_v1.py"))).unlock()
    config.update({"mesh_fsdp": 8, "remat": "block"})
    chosen = recipe.read(config)
    layout = sharding.make_layout(chosen.train.mesh_fsdp, chosen.train.mesh_tensor)
    batches = batching.plan(chosen.train, layout)
    optimizer = optimizers.make_optimizer(chosen.optimizer)
    state = jax.eval_shape(lambda: init_state(chosen.network, optimizer, jax.random.key(0)))
    placement = layout.of_state(state)
    state = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, placement)
    shape = (batches.rows, chosen.data.max_target_length)
    batch = {name: jax.ShapeDtypeStruct(shape, np.int32, sharding=layout.sharding("batch")) for name in ROW_ARRAYS}
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=layout.sharding())
    step = make_train_step(chosen.network, optimizer, 0.0, layout=layout, accumulation=batches.accumulation)
    step = jax.jit(step, donate_argnums=0, out_shardings=(placement, layout.sharding()))
    memory = step.lower(state, batch, key).compile().memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


if __name__ == "__main__":
    print(json.dumps({name: run(*case) for name, case in CASES.items()} | {"bytes": bytes_of_the_largest_recipe()}))
