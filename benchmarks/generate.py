"""How much faster ten texts are written in one batch than one at a time, token by token, as the original does.

python benchmarks/generate.py

10 texts of 128 tokens, 16 of them a prompt; 12 layers x 768, vocabulary 30,000, random weights, float32. The two ways
take turns; the table shows the median of the rounds.
"""

import functools
import statistics
import time

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
ROUNDS = 5


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


def main():
    """Prints the table."""
    params = jax.jit(models.init, static_argnums=0)(CONFIG, jax.random.key(0))
    params["logits"]["bias"] = params["logits"]["bias"].at[EOS_ID].set(-1e9)  # no text ends early
    ways = {
        "one text at a time, token by token": one_at_a_time,
        "all texts in one batch, prompt in one pass": in_one_batch,
    }
    seconds = {name: [] for name in ways}
    for turn in range(ROUNDS + 1):
        for name, write in ways.items():
            start = time.perf_counter()
            write(params)
            if turn:  # the first compiles
                seconds[name].append(time.perf_counter() - start)
    new_tokens = NUM_TEXTS * (SAMPLING.max_length - len(PROMPT))
    first, second = seconds.values()
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    table = Table("way", "seconds", "new tokens/s", "ratio", title=f"{NUM_TEXTS} texts of 128 tokens, 12 x 768")
    for name, times in seconds.items():
        median = statistics.median(times)
        ratio = "1" if times is first else f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        table.add_row(name, f"{median:.2f}", f"{new_tokens / median:.1f}", ratio)
    rich.console.Console(width=120).print(table)


if __name__ == "__main__":
    main()
