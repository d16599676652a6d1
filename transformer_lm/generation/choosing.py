"""How the tokens of texts are chosen: settings of each text, and what they do to the logits of a batch.

Settings are data, not shapes: changing one compiles nothing.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from transformer_lm.errors import UserError
from transformer_lm.fields import CountOrZero, NotNegative, Positive, Range, Share, check, check_value
from transformer_lm.generation.sampler import SMALLEST_TEMPERATURE

MAX_ALTERNATIVES = 20  # likeliest tokens that are told of each place
LARGEST_SEED = 2**63 - 1
MAX_BIASES = 1024

Penalty = Annotated[float, Range(least=-2, most=2)]
Probability = Annotated[float, Range(least=0, most=1)]
LongSeed = Annotated[int, Range(least=0, most=LARGEST_SEED)]
AlternativeCount = Annotated[int, Range(least=0, most=MAX_ALTERNATIVES)]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the tokens of one text are chosen.

    Penalties and biases change the logits first; then the temperature divides them; then top_k, top_p and min_p, in
    this order, leave the likeliest tokens, of which one is drawn.
    """

    temperature: NotNegative = 1.0  # 0 takes the likeliest token
    top_k: CountOrZero = 0  # the k likeliest, and those exactly as likely as the last of them; 0 for all
    top_p: Share = 1.0  # the fewest likeliest whose probabilities reach it together; 1 for all
    min_p: Probability = 0.0  # those at least so likely, as a share of the likeliest one's probability
    # Logits of tokens that prompt or text have are divided by it, or multiplied where negative (Keskar et al. 2019).
    repetition_penalty: Positive = 1.0
    frequency_penalty: Penalty = 0.0  # taken from a logit for each time that the text has the token
    presence_penalty: Penalty = 0.0  # taken from a logit if the text has the token
    logit_bias: Mapping = dataclasses.field(default_factory=dict)  # added to the logits of token ids
    seed: LongSeed = 0
    alternatives: AlternativeCount = 0  # how many of the likeliest tokens are told beside the chosen one

    def __post_init__(self):
        check(self)
        if len(self.logit_bias) > MAX_BIASES:
            raise UserError(f"logit_bias has {len(self.logit_bias)} tokens; at most {MAX_BIASES} are taken.")
        for token, bias in self.logit_bias.items():
            check_value("logit_bias's token", token, CountOrZero)
            check_value(f"logit_bias[{token}]", bias, Annotated[float, Range(least=-100, most=100)])


def table_of(slots: int) -> dict[str, np.ndarray]:
    """What the host hands over of each text at every step; as of a slot that is free."""
    floats = ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
    return {
        **{name: np.full(slots, getattr(Settings(), name), np.float32) for name in floats},
        "top_k": np.zeros(slots, np.int32),
        "seed": np.zeros((slots, 2), np.uint32),  # its high and low half, of which JAX makes the same key
        "number": np.zeros(slots, np.int32),
        "alternatives": np.zeros(slots, np.int32),
        "written": np.zeros(slots, np.int32),
    }


def change(logits, bias, counts, prompted, table) -> jax.Array:
    """Logits [N, V] as biases and penalties change them."""
    column = {name: values[:, None] for name, values in table.items() if values.ndim == 1}
    repeated = logits * jnp.where(logits > 0, 1 / column["repetition_penalty"], column["repetition_penalty"])
    logits = jnp.where(prompted | (counts > 0), repeated, logits) + bias
    return logits - column["frequency_penalty"] * counts - column["presence_penalty"] * (counts > 0)


def choose(logits, keys, table) -> jax.Array:
    """Chooses a token a row: logits [N, V], one key a row [N] -> ids [N] int32."""
    greedy = table["temperature"] < SMALLEST_TEMPERATURE
    scaled = logits / jnp.where(greedy, 1, table["temperature"])[:, None]
    for needed, cut in (
        (table["top_k"] > 0, _cut_top_k), (table["top_p"] < 1, _cut_top_p), (table["min_p"] > 0, _cut_min_p)
    ):  # fmt: skip
        scaled = jax.lax.cond(jnp.any(needed), cut, lambda logits, _: logits, scaled, table)
    drawn = jax.vmap(jax.random.categorical)(keys, scaled)
    return jnp.where(greedy, jnp.argmax(logits, axis=-1), drawn).astype(jnp.int32)


def _cut_top_k(logits, table):
    """Logits [N, V] with -inf for what top_k leaves out, without sorting them."""
    top_k = table["top_k"][:, None]
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    order = jax.lax.bitcast_convert_type(bits ^ (bits >> 31 & 0x7FFFFFFF), jnp.uint32) ^ jnp.uint32(1 << 31)
    least = _largest(lambda value: jnp.sum(order >= value, axis=-1, keepdims=True) >= top_k, len(logits))
    return jnp.where((top_k == 0) | (order >= least), logits, -jnp.inf)


def _cut_top_p(logits, table):
    """Logits [N, V] with -inf for what top_p leaves out."""
    top_p = jnp.maximum(table["top_p"], jnp.finfo(jnp.float32).tiny)[:, None]  # a smaller one has become 0
    probabilities = jax.nn.softmax(logits, axis=-1)
    order = jax.lax.bitcast_convert_type(probabilities, jnp.uint32)  # as the probabilities', none being negative

    def reaches(value):
        return jnp.sum(jnp.where(order >= value, probabilities, 0), axis=-1, keepdims=True) >= top_p

    return jnp.where((top_p == 1) | (order >= _largest(reaches, len(logits))), logits, -jnp.inf)


def _cut_min_p(logits, table):
    """Logits [N, V] with -inf for what min_p leaves out."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    enough = probabilities >= table["min_p"][:, None] * probabilities.max(axis=-1, keepdims=True)
    return jnp.where(enough, logits, -jnp.inf)


def _largest(holds, rows: int):
    """The largest uint32 a row [rows, 1] for which something holds that holds for all smaller ones, or else 0."""

    def try_bit(number, found):
        larger = found | (jnp.uint32(1 << 31) >> number.astype(jnp.uint32))
        return jnp.where(holds(larger), larger, found)

    return jax.lax.fori_loop(0, 32, try_bit, jnp.zeros((rows, 1), jnp.uint32))
