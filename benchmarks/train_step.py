"""Training steps against the machine's own matrix products, and against other systems.

python benchmarks/train_step.py [--shapes=small,0.1b] [--dtypes=float32] [--json=FILE]    (extra `interop`)

Networks of the same sizes on the same batches: dropout 0.1, AdamW, vocabulary 30,000. Each contender has a process of
its own, as its users run it (on Linux our commands take memory in large pages; GLIBC_TUNABLES=glibc.malloc.hugetlb=1
gives them to all), and they take turns; the table shows the median of the rounds, and ratios of one round. Where
memory is not enough for all, they come one after the other (--alone).

Contenders:

- lm1b: Flax's example as the original project had it, written anew: unrolled layers, attention and dropout of Flax,
  one-hot targets;
- Hugging Face GPT-2 in PyTorch, as it comes;
- nanoGPT: a plain GPT-2 in PyTorch with scaled_dot_product_attention, as it is and under torch.compile.

On a GPU all of them run on it; PyTorch needs a build for it.
"""

import contextlib
import functools
import importlib.util
import json
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
from absl import app, flags
from rich.table import Table

from transformer_lm import models
from transformer_lm.data import packing
from transformer_lm.training import optimizers
from transformer_lm.training.flops import PEAK_FLOPS, flops_per_token
from transformer_lm.training.state import init_state
from transformer_lm.training.step import make_train_step


class Shape(NamedTuple):
    """A network, and its batch."""

    layers: int
    width: int
    heads: int
    rows: int
    length: int


SHAPES = {
    "small": Shape(6, 512, 8, 8, 128),
    "0.1b": Shape(12, 768, 12, 2, 256),
    "0.1b-1024": Shape(12, 768, 12, 1, 1024),
    "1.0b": Shape(18, 2048, 16, 1, 1024),
}
VOCAB_SIZE = 30_000
PRODUCT, LARGE_PRODUCT = 2048, 8192  # rows and columns of the matrices that the peak is measured with; on accelerators
OURS = "transformer-lm-japanese"
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # as our commands take memory

_SHAPES = flags.DEFINE_list("shapes", ["small", "0.1b"], f"Of {', '.join(SHAPES)}.")
_DTYPES = flags.DEFINE_list("dtypes", ["float32"], "float32, bfloat16: what networks compute in.")
_TOKENS = flags.DEFINE_integer(
    "tokens", 0, "Tokens of a batch in place of the shape's: more where there is room, fewer than a row's where not."
)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Rounds that are counted.")
_DROPOUT = flags.DEFINE_float("dropout", 0.1, "Dropout of all networks.")
_ALONE = flags.DEFINE_bool("alone", False, "Contenders come one after the other, not in turns: each has all memory.")
_ONLY = flags.DEFINE_list("only", [], "Contenders; all that can run by default.")
_JSON = flags.DEFINE_string("json", None, "File for the figures.")


class Device(NamedTuple):
    """What contenders run on."""

    kind: str
    product: int  # rows and columns of the matrices that the peak is measured with


class Case(NamedTuple):
    """What every contender is given."""

    config: models.TransformerConfig
    tokens: np.ndarray  # [B, T] uint16
    device: Device


def find_device() -> Device:
    """The device, as a process finds it that ends then: an accelerator is the contenders'."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_find_device)


def _find_device() -> Device:
    [device, *_] = jax.devices()
    return Device(device.device_kind, PRODUCT if device.platform == "cpu" else LARGE_PRODUCT)


def matrix_product(case: Case) -> Callable[[], None]:
    """A product of square matrices."""
    a = jax.random.normal(jax.random.key(0), (case.device.product,) * 2).astype(models.DTYPES[case.config.dtype])
    product = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(product(a, a))


def stepping(step: Callable, state) -> Callable[[], None]:
    """Runs a compiled step, state -> state and metrics, again and again."""

    def run():
        nonlocal state
        state, metrics = step(state)
        jax.block_until_ready((state, metrics))

    return run


def ours(case: Case) -> Callable[[], None]:
    """A train step of this project."""
    optimizer = optimizers.make_optimizer(optimizers.OptimizerConfig(0.001, 1, 0.1))
    state = jax.jit(lambda key: init_state(case.config, optimizer, key))(jax.random.key(0))
    step = jax.jit(make_train_step(case.config, optimizer, 0.0), donate_argnums=0)
    batch, key = packing.unpack(case.tokens), jax.random.key(1)
    return stepping(lambda state: step(state, batch, key), state)


def lm1b(case: Case) -> Callable[[], None]:
    """A train step as Flax's lm1b example has it."""
    from flax import linen

    config, batch = case.config, packing.unpack(case.tokens)
    dense = functools.partial(linen.Dense, kernel_init=linen.initializers.xavier_uniform(), dtype=config.dtype)

    class Network(linen.Module):
        @linen.compact
        def __call__(self, inputs, positions, segments):
            drop = functools.partial(linen.Dropout, config.dropout_rate, deterministic=False)
            norm = functools.partial(linen.LayerNorm, dtype=config.dtype)
            causal = linen.make_causal_mask(inputs)
            mask = linen.combine_masks(causal, linen.make_attention_mask(segments, segments, jnp.equal))
            table = jnp.asarray(models.sinusoidal_positions(config.max_len, config.emb_dim))
            x = linen.Embed(config.vocab_size, config.emb_dim, embedding_init=linen.initializers.normal(1.0))(inputs)
            x = drop()(x + table[positions]).astype(config.dtype)
            for _ in range(config.num_layers):
                attention = linen.MultiHeadDotProductAttention(
                    config.num_heads, dtype=config.dtype, qkv_features=config.qkv_dim, use_bias=False,
                    dropout_rate=config.attention_dropout_rate, broadcast_dropout=False, deterministic=False,
                )  # fmt: skip
                x = x + drop()(attention(norm()(x), mask=mask))
                hidden = drop()(linen.relu(dense(config.mlp_dim)(norm()(x))))
                x = x + drop()(dense(config.emb_dim)(hidden))
            return dense(config.vocab_size)(norm()(x))

    network, weights = Network(), (batch["segments"] > 0).astype(np.float32)
    inputs = [jnp.asarray(batch[name]) for name in ("inputs", "positions", "segments")]
    optimizer = optax.adamw(0.001, b1=0.9, b2=0.98, eps=1e-9, weight_decay=0.1)

    def loss(params, key):
        logits = network.apply({"params": params}, *inputs, rngs={"dropout": key})
        targets = jax.nn.one_hot(batch["targets"], config.vocab_size)
        return -jnp.sum(jnp.sum(targets * linen.log_softmax(logits), axis=-1) * weights) / weights.sum()

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        params, opt_state, key = state
        key, dropout_key = jax.random.split(key)
        value, grads = jax.value_and_grad(loss)(params, dropout_key)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, key), value

    @jax.jit
    def init(key):
        params = network.init({"params": key, "dropout": key}, *inputs)["params"]
        return params, optimizer.init(params), key

    return stepping(step, init(jax.random.key(0)))


def in_pytorch(case: Case, network, loss_of: Callable, *, compiled: bool = False) -> Callable[[], None]:
    """A train step of a PyTorch network, whose loss for ids [B, T] `loss_of` gives."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = network.to(device).train()
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=0.001, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.1, fused=True
    )
    ids = torch.as_tensor(case.tokens.astype(np.int64), device=device)
    compute = torch.compile(loss_of) if compiled else loss_of

    def run():
        with torch.autocast(device, torch.bfloat16, enabled=case.config.dtype == "bfloat16"):
            loss = compute(network, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def hugging_face(case: Case) -> Callable[[], None]:
    """A train step of transformers' GPT-2."""
    import transformers

    config = case.config
    network = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.max_len, n_embd=config.emb_dim, n_layer=config.num_layers,
            n_head=config.num_heads, n_inner=config.mlp_dim, activation_function="relu", tie_word_embeddings=False,
            resid_pdrop=config.dropout_rate, embd_pdrop=config.dropout_rate, attn_pdrop=config.dropout_rate,
        )
    )  # fmt: skip
    return in_pytorch(case, network, lambda network, ids: network(input_ids=ids, labels=ids).loss)


def nanogpt(case: Case, *, compiled: bool = False) -> Callable[[], None]:
    """A train step of a plain GPT-2."""
    import torch
    from torch import nn
    from torch.nn import functional

    config = case.config
    width, heads, rate = config.emb_dim, config.num_heads, config.dropout_rate

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
            self.up, self.down = nn.Linear(width, config.mlp_dim), nn.Linear(config.mlp_dim, width)
            self.dropout = nn.Dropout(rate)

        def forward(self, x):
            rows, length, _ = x.shape
            query, key, value = (
                part.view(rows, length, heads, -1).transpose(1, 2)
                for part in self.qkv(self.norm1(x)).split(width, dim=2)
            )
            attended = functional.scaled_dot_product_attention(
                query, key, value, dropout_p=rate if self.training else 0.0, is_causal=True
            )
            x = x + self.dropout(self.out(attended.transpose(1, 2).reshape(rows, length, width)))
            return x + self.dropout(self.down(functional.relu(self.up(self.norm2(x)))))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.positions = nn.Embedding(config.vocab_size, width), nn.Embedding(config.max_len, width)
            self.blocks = nn.ModuleList(Block() for _ in range(config.num_layers))
            self.norm, self.logits = nn.LayerNorm(width), nn.Linear(width, config.vocab_size)
            self.dropout = nn.Dropout(rate)

        def forward(self, ids):
            x = self.dropout(self.embed(ids) + self.positions.weight[: ids.shape[1]])
            for block in self.blocks:
                x = block(x)
            return self.logits(self.norm(x))

    def loss_of(network, ids):
        logits = network(ids)
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())

    torch.set_float32_matmul_precision("high")
    return in_pytorch(case, Network(), loss_of, compiled=compiled)


CONTENDERS: dict[str, Callable[[Case], Callable[[], None]]] = {
    OURS: ours,
    "lm1b": lm1b,
    "Hugging Face GPT-2": hugging_face,
    "nanoGPT": nanogpt,
    "nanoGPT compiled": functools.partial(nanogpt, compiled=True),
}


def contenders() -> dict[str, Callable]:
    """Those that are asked for and can run."""
    found = {name: make for name, make in CONTENDERS.items() if not _ONLY.value or name in _ONLY.value}
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")):
        found = {name: make for name, make in found.items() if make in (ours, lm1b)}
    return found


def serve(make: Callable[[Case], Callable[[], None]], case: Case, pipe):
    """Runs in a contender's process: for every message the seconds that one run takes, and first whether it can run.

    It is a run after another, as in training: while others had their turn, a virtual machine may have given away the
    memory that a step frees.
    """
    try:
        run = make(case)
        run()  # compiles
    except Exception:
        traceback.print_exc()
        return pipe.send(False)
    pipe.send(True)
    while pipe.recv():
        run()
        start = time.perf_counter()
        run()
        pipe.send(time.perf_counter() - start)
    return None


def start(name: str, make: Callable, case: Case) -> Connection:
    """The pipe of a contender's process, which makes ready."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    with mock.patch.dict(os.environ, LARGE_PAGES | os.environ if name == OURS else {}):
        context.Process(target=serve, args=(make, case, theirs), daemon=True).start()
    theirs.close()
    return pipe


def is_ready(pipe: Connection) -> bool:
    """Waits until a contender has run once, or could not."""
    with contextlib.suppress(EOFError):  # it was killed, for want of memory
        return pipe.recv()
    return False


def ask(pipe: Connection) -> float:
    """Seconds of a contender's run."""
    pipe.send(True)
    return pipe.recv()


def end(pipe: Connection):
    """Ends a contender's process, and waits until it has given its memory back."""
    pipe.send(False)
    with contextlib.suppress(EOFError):
        pipe.recv()


def take_turns(makers: dict[str, Callable], case: Case) -> dict[str, list[float]]:
    """Seconds of every run of every contender that can run, one at a time; the first of each warms up."""
    seconds: dict[str, list[float]] = {}
    for group in [{name: make} for name, make in makers.items()] if _ALONE.value else [makers]:
        started = {name: start(name, make, case) for name, make in group.items()}
        pipes = {name: pipe for name, pipe in started.items() if is_ready(pipe)}
        turns = [{name: ask(pipe) for name, pipe in pipes.items()} for _ in range(_ROUNDS.value + 1)]
        seconds |= {name: [turn[name] for turn in turns[1:]] for name in pipes}
        for pipe in pipes.values():
            end(pipe)
    return seconds


def measure(name: str, dtype: str, device: Device, table: Table) -> list[dict]:
    """Adds the rows of one shape to the table, and gives them back; none if this project cannot run it."""
    shape = SHAPES[name]
    length = min(shape.length, _TOKENS.value or shape.length)
    rows = _TOKENS.value // length or shape.rows
    config = models.TransformerConfig(
        vocab_size=VOCAB_SIZE, emb_dim=shape.width, num_heads=shape.heads, num_layers=shape.layers,
        qkv_dim=shape.width, mlp_dim=4 * shape.width, max_len=length, dtype=dtype,
        dropout_rate=_DROPOUT.value, attention_dropout_rate=_DROPOUT.value,
    )  # fmt: skip
    tokens = np.random.default_rng(0).integers(3, VOCAB_SIZE, (rows, length)).astype(np.uint16)
    seconds = take_turns({"matrix product": matrix_product, **contenders()}, Case(config, tokens, device))
    if not {"matrix product", OURS} <= seconds.keys():
        return []
    peak = 2 * device.product**3 / statistics.median(seconds.pop("matrix product"))
    sheet = PEAK_FLOPS.get(device.kind) if dtype == "bfloat16" else None
    found = []
    for system, times in seconds.items():
        speed = tokens.size / statistics.median(times)
        flops = speed * flops_per_token(config, length)
        ratios = sorted(theirs / our for our, theirs in zip(seconds[OURS], times, strict=True))
        found.append({
            "shape": name, "dtype": dtype, "rows": rows, "length": length, "system": system,
            "tokens_per_second": speed, "flops": flops, "product_flops": peak, "sheet_flops": sheet,
            "ours_is_faster_by": statistics.median(ratios), "least": ratios[0], "most": ratios[-1],
        })  # fmt: skip
        table.add_row(
            f"{name}: {shape.layers} x {shape.width}, {rows} x {length}, {dtype}", system, f"{speed:.0f}",
            f"{flops / 1e9:.0f}", f"{100 * flops / peak:.0f} % of {peak / 1e9:.0f}",
            f"{100 * flops / sheet:.1f} %" if sheet else "",
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})",
        )  # fmt: skip
    return found


def main(_):
    """Prints the table, and writes --json."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "true" if _ALONE.value else "false")
    table = Table(
        "network and batch", "system", "tokens/s", "model GFLOP/s", "of a product", "of its sheet", "ours is faster by"
    )  # fmt: skip
    device = find_device()
    jax.config.update("jax_platforms", "cpu")  # of this process
    figures = [row for name in _SHAPES.value for dtype in _DTYPES.value for row in measure(name, dtype, device, table)]
    rich.console.Console(width=150).print(table)
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps({"device": device.kind, "rows": figures}, indent=1))


if __name__ == "__main__":
    app.run(main)
