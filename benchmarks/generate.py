"""How fast texts are written: against one at a time, as the original does, and against the memory's bandwidth.

python benchmarks/generate.py

12 layers x 768, vocabulary 30,000, random weights, float32; tables show the medians of the rounds.

The first table: 10 texts of 128 tokens, 16 of them a prompt, in turns with the original's way: one after the other, the
prompt token by token, too. The second: a decoding step, as the difference between long texts and short ones, by the
number of texts, with weights as they are for training and as `models.for_decoding` lays them. A step reads all weights
but the embedding, and the cache; at best it takes as long as that at the bandwidth that was measured beside it, by
adding up a large array.
"""

import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
from rich.table import Table

from transformer_lm import models
from transformer_lm.generation import sampler
from transformer_lm.tokenizer import EOS_ID

CONFIG = models.TransformerConfig(
    vocab_size=30_000, emb_dim=768, num_heads=12, num_layers=12, qkv_dim=768, mlp_dim=3072, max_len=128
)
SAMPLING = sampler.SamplingConfig(temperature=0.6, top_k=20, max_length=128)
NUM_TEXTS = 10
PROMPT = list(range(100, 116))
ROUNDS = 3
BATCHES = (1, 10, 64)
SHORT = 24  # tokens of the short ones of the texts whose difference is decoding steps
SUMMED = 2**28  # float32 numbers, 1 GiB


@functools.partial(jax.jit, static_argnums=0)
def write_one(config, params, prompt, key):
    """One text, every token of the prompt fed by itself: [P] prompt -> [max_length] ids."""
    model = models.bind(config, params)

    def step(position, state):
        tokens, token, cache = state
        logits, cache = model.extend(token[None, None], jnp.full((1, 1), position), jnp.ones((1, 1), bool), cache)
        sampled = sampler.sample(logits, jax.random.fold_in(key, position)[None], SAMPLING)[0]
        token = jnp.where(position < len(prompt), tokens[position], sampled)
        return tokens.at[position].set(token), token, cache

    tokens = jnp.zeros(SAMPLING.max_length, jnp.int32).at[: len(prompt)].set(prompt)
    state = tokens, jnp.zeros((), jnp.int32), models.empty_cache(config, 1, SAMPLING.max_length)
    return jax.lax.fori_loop(0, SAMPLING.max_length, step, state)[0]


def one_at_a_time(params):
    """Texts one after the other."""
    for i in range(NUM_TEXTS):
        tokens = write_one(CONFIG, params, np.array(PROMPT), jax.random.key(i))
        assert EOS_ID not in np.asarray(tokens)


def in_one_batch(params):
    """What generate_text.py does."""
    [texts] = sampler.generate(CONFIG, params, [PROMPT], num_samples=NUM_TEXTS, sampling=SAMPLING, seed=0)
    assert all(len(text.tokens) == SAMPLING.max_length - len(PROMPT) for text in texts)


def compare_ways(params) -> Table:
    """Ten texts in two ways."""
    ways = {
        "one text at a time, token by token": functools.partial(one_at_a_time, params),
        "all texts in one batch, prompt in one pass": functools.partial(in_one_batch, models.for_decoding(params)),
    }
    seconds = in_turns(ways)
    new_tokens = NUM_TEXTS * (SAMPLING.max_length - len(PROMPT))
    first, second = seconds.values()
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    table = Table("way", "seconds", "new tokens/s", "ratio", title=f"{NUM_TEXTS} texts of 128 tokens, 12 x 768")
    for name, times in seconds.items():
        median = statistics.median(times)
        ratio = "1" if times is first else f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        table.add_row(name, f"{median:.2f}", f"{new_tokens / median:.1f}", ratio)
    return table


def in_turns(ways: dict[Hashable, Callable[[], object]]) -> dict[Hashable, list[float]]:
    """Seconds that each way takes in each round."""
    seconds = {name: [] for name in ways}
    for turn in range(ROUNDS + 1):
        for name, run in ways.items():
            taken = clock(run)
            if turn:  # the first compiles
                seconds[name].append(taken)
    return seconds


def clock(run: Callable[[], object]) -> float:
    """Seconds that something takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def long() -> int:
    """Tokens of the long ones of these texts: an accelerator takes little time for each."""
    return 56 if jax.default_backend() == "cpu" else 280


def write_texts(params, number: int, length: int):
    """So many texts of so many tokens."""
    sampling = dataclasses.replace(SAMPLING, max_length=length)
    sampler.generate(CONFIG, params, [PROMPT], num_samples=number, sampling=sampling, seed=0)


def bytes_of_step(params, number: int) -> int:
    """What a decoding step of so many texts reads: weights, and the cache's slots."""
    weights = sum(x.nbytes for x in jax.tree.leaves(params)) - params["embed"]["embedding"].nbytes
    slots = sampler.padded_length(len(PROMPT)) + long()
    cache = jax.eval_shape(lambda: models.empty_cache(CONFIG, number, slots))
    return weights + sum(math.prod(x.shape) * x.dtype.itemsize for x in (*cache.keys, *cache.values))


def measure_bandwidth() -> float:
    """Bytes a second that the memory gives at best."""
    numbers, add_up = jnp.ones(SUMMED), jax.jit(jnp.sum)
    return numbers.nbytes / min(clock(lambda: jax.block_until_ready(add_up(numbers))) for _ in range(20))


def compare_with_bandwidth(params) -> Table:
    """A decoding step against the memory."""
    kinds = {"as in training": params, "for decoding": models.for_decoding(params)}
    cases = list(itertools.product(BATCHES, kinds))
    bandwidth = measure_bandwidth()
    seconds = in_turns(
        {
            (number, kind, length): functools.partial(write_texts, kinds[kind], number, length)
            for number, kind in cases
            for length in (SHORT, long())
        }
    )
    bandwidth = max(bandwidth, measure_bandwidth())
    names = ("texts", "weights", "ms a step", "tokens/s", "MB a step", "GB/s", "of the bandwidth")
    table = Table(*names, title="Decoding steps")
    for number, kind in cases:
        pairs = zip(seconds[number, kind, long()], seconds[number, kind, SHORT], strict=True)
        step = statistics.median(more - less for more, less in pairs) / (long() - SHORT)
        read = bytes_of_step(params, number)
        table.add_row(
            str(number), kind, f"{step * 1000:.1f}", f"{number / step:.1f}", f"{read / 1e6:.0f}",
            f"{read / step / 1e9:.1f}", f"{100 * read / step / bandwidth:.0f} % of {bandwidth / 1e9:.1f} GB/s",
        )  # fmt: skip
    return table


def main():
    """Prints the tables."""
    params = jax.jit(models.init, static_argnums=0)(CONFIG, jax.random.key(0))
    params["logits"]["bias"] = params["logits"]["bias"].at[EOS_ID].set(-1e9)  # no text ends early
    console = rich.console.Console(width=120)
    console.print(compare_ways(params))
    console.print(compare_with_bandwidth(params))


if __name__ == "__main__":
    main()
