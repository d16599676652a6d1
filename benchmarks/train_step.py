"""Training steps against the machine's own matrix products, and against Hugging Face GPT-2 in PyTorch.

python benchmarks/train_step.py          (PyTorch's rows need the extra `interop`)

Networks of the same sizes on the same batches: dropout 0.1, AdamW, float32, vocabulary 30,000. Each contender has a
process of its own, as its users run it, and they take turns; the table shows the median of the rounds.
"""

import importlib.util
import multiprocessing
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
from rich.table import Table

from transformer_lm import models
from transformer_lm.data import packing
from transformer_lm.training import optimizers
from transformer_lm.training.flops import flops_per_token
from transformer_lm.training.state import init_state
from transformer_lm.training.step import make_train_step

ROUNDS = 7
PRODUCT = 2048  # rows and columns of the matrices that the peak is measured with
SHAPES = [  # (layers, width, heads, rows, tokens a row)
    (6, 512, 8, 8, 128),
    (12, 768, 12, 2, 256),
]
VOCAB_SIZE = 30_000


def matrix_product() -> Callable[[], None]:
    """A product of square float32 matrices."""
    a = jax.random.normal(jax.random.key(0), (PRODUCT, PRODUCT))
    product = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(product(a, a))


def ours(config: models.TransformerConfig, tokens: np.ndarray) -> Callable[[], None]:
    """A train step of this project on [B, T] tokens."""
    optimizer = optimizers.make_optimizer(optimizers.OptimizerConfig(0.001, 1, 0.1))
    make_state = jax.jit(lambda key: init_state(config, optimizer, key))
    state = make_state(jax.random.key(0))
    step = jax.jit(make_train_step(config, optimizer, 0.0), donate_argnums=0)
    batch = packing.unpack(tokens)
    key = jax.random.key(1)

    def run():
        nonlocal state
        state, metrics = step(state, batch, key)
        jax.block_until_ready((state, metrics))

    return run


def hugging_face(config: models.TransformerConfig, tokens: np.ndarray) -> Callable[[], None]:
    """A train step of GPT-2 on the same tokens."""
    import torch
    import transformers

    network = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=tokens.shape[1],
            n_embd=config.emb_dim,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            n_inner=config.mlp_dim,
            activation_function="relu",
            tie_word_embeddings=False,
            resid_pdrop=0.1,
            embd_pdrop=0.1,
            attn_pdrop=0.1,
        )
    ).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.001, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.1)
    ids = torch.as_tensor(tokens.astype(np.int64))

    def run():
        network(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def serve(make: Callable[..., Callable[[], None]], args: tuple, pipe):
    """Runs in a contender's process: for every message the seconds that one run takes."""
    run = make(*args)
    while pipe.recv():
        start = time.perf_counter()
        run()
        pipe.send(time.perf_counter() - start)


def take_turns(contenders: dict[str, tuple]) -> dict[str, list[float]]:
    """Seconds of every run of every contender (make, *arguments of make), `ROUNDS` a contender, one at a time."""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for name, (make, *args) in contenders.items():
        pipes[name], theirs = context.Pipe()
        context.Process(target=serve, args=(make, tuple(args), theirs), daemon=True).start()
    seconds = {name: [] for name in contenders}
    for turn in range(ROUNDS + 2):
        for name, pipe in pipes.items():
            pipe.send(True)
            taken = pipe.recv()
            if turn >= 2:  # the first ones compile and warm up
                seconds[name].append(taken)
    for pipe in pipes.values():
        pipe.send(False)
    return seconds


def measure(shape: tuple[int, ...], table: Table):
    """Adds the rows of one shape."""
    layers, width, heads, rows, length = shape
    config = models.TransformerConfig(
        vocab_size=VOCAB_SIZE, emb_dim=width, num_heads=heads, num_layers=layers, qkv_dim=width, mlp_dim=4 * width,
        max_len=length,
    )  # fmt: skip
    tokens = np.random.default_rng(0).integers(3, VOCAB_SIZE, (rows, length)).astype(np.uint16)
    contenders = {"matrix product": (matrix_product,), "transformer-lm-japanese": (ours, config, tokens)}
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        contenders["Hugging Face GPT-2, PyTorch"] = (hugging_face, config, tokens)
    seconds = take_turns(contenders)
    peak = 2 * PRODUCT**3 / statistics.median(seconds.pop("matrix product"))
    base = seconds.get("Hugging Face GPT-2, PyTorch")
    for name, times in seconds.items():
        speed = tokens.size / statistics.median(times)
        flops = speed * flops_per_token(config, length)
        ratio = statistics.median(a / b for a, b in zip(base, times, strict=True)) if base else float("nan")
        table.add_row(
            f"{layers} x {width}, batch {rows} x {length}", name, f"{speed:.0f}", f"{flops / 1e9:.0f}",
            f"{100 * flops / peak:.0f} % of {peak / 1e9:.0f}", f"{ratio:.2f}",
        )  # fmt: skip


def main():
    """Prints the table."""
    table = Table("network", "system", "tokens/s", "model GFLOP/s", "of the peak, GFLOP/s", "speed against PyTorch")
    for shape in SHAPES:
        measure(shape, table)
    rich.console.Console(width=120).print(table)


if __name__ == "__main__":
    main()
