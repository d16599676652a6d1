"""Texts that begin and end at different times, written side by side: a batch of slots, prefilled and stepped by hand.

engine = Engine(network, params, slots=8, context=2048)
engine.prefill(0, prompt, Settings(temperature=0.6, seed=1))      # into slot 0; others may be in the midst of a text
choice = engine.step()                                            # one more token of every text
engine.release(0)

Settings are data, not shapes: changing one compiles nothing. A text depends on its prompt, its settings and its number
alone. On CPU that holds bit for bit, whatever stands in the other slots; on other devices rounding may differ from one
slot to another.

Letters in shapes: N slots, C tokens that a slot holds, V vocabulary, G heads of keys and values, K head size.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from transformer_lm import models
from transformer_lm.attention import SLOT_BLOCK
from transformer_lm.errors import UserError
from transformer_lm.fields import CountOrZero, NotNegative, Positive, Range, Share, check, check_value
from transformer_lm.generation.sampler import SMALLEST_TEMPERATURE, padded_length
from transformer_lm.tokenizer import START_ID

MAX_ALTERNATIVES = 20  # likeliest tokens that are told of each place
SCORED_BLOCK = 256  # tokens of a prompt of which logits are made at once
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


@dataclasses.dataclass(frozen=True)
class Choice:
    """What stands at a place of each slot; where no text is being written it means nothing.

    Attributes:
      tokens: [N] int32.
      log_probs: [N] float32, of the tokens by the network's own logits, before settings change them.
      alternatives: [N, MAX_ALTERNATIVES] int32, the likeliest tokens, likeliest first, where settings ask for some.
      alternative_log_probs: [N, MAX_ALTERNATIVES] float32.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    alternatives: np.ndarray
    alternative_log_probs: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """What the device keeps.

    Attributes:
      keys, values: one array a layer, [N, G, C, K], C rounded up to whole blocks of attention.
      logits: [N, V] float32, for the next token.
      bias: [N, V] float32, added to them.
      counts: [N, V] int32, how often the text has each token.
      prompted: [N, V] bool, which tokens the prompt has.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    logits: jax.Array
    bias: jax.Array
    counts: jax.Array
    prompted: jax.Array


def _table(slots: int) -> dict[str, np.ndarray]:
    """What the host knows of each slot and hands over at every step; as of a slot that is free."""
    floats = ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
    return {
        **{name: np.full(slots, getattr(Settings(), name), np.float32) for name in floats},
        "top_k": np.zeros(slots, np.int32),
        "seed": np.zeros((slots, 2), np.uint32),  # its high and low half, of which JAX makes the same key
        "number": np.zeros(slots, np.int32),
        "alternatives": np.zeros(slots, np.int32),
        "written": np.zeros(slots, np.int32),
        "length": np.zeros(slots, np.int32),  # tokens read, START_ID included
        "active": np.zeros(slots, np.int32),  # 1 where a text is being written
    }


class Engine:
    """A network with a fixed number of slots, each of which holds a text of at most `context` tokens."""

    def __init__(self, network: models.TransformerConfig, params: models.Params, *, slots: int, context: int):
        """The engine; `context` counts the tokens of prompt and continuation together."""
        check_value("slots", slots, Annotated[int, Range(least=1, most=4096)])
        check_value("context", context, Annotated[int, Range(least=1, most=2**20)])
        self.network = dataclasses.replace(network, max_len=max(network.max_len, context))
        self._params, self.slots, self.context = models.unstack(params), slots, context
        self.reset()

    def reset(self):
        """Frees all slots."""
        self._last_prompt: tuple[tuple[int, ...], tuple] | None = None
        self._table = _table(self.slots)
        self._state: Slots | None = None  # the old one goes before the new one comes
        self._state = _empty(self.network, self.slots, self.context)

    def check(self, prompt: list[int], max_tokens: int, settings: Settings | None = None):
        """Raises UserError if there is no room for so many tokens behind a prompt, or an id is no token's."""
        for name, tokens in (("prompt", prompt), ("logit_bias", settings.logit_bias if settings else ())):
            if wrong := [token for token in tokens if not 0 <= token < self.network.vocab_size]:
                last = self.network.vocab_size - 1
                raise UserError(f"{name} has the token {wrong[0]}; the model has those from 0 to {last}.")
        if len(prompt) + max_tokens > self.context:
            raise UserError(
                f"prompt has {len(prompt)} tokens, and max_tokens={max_tokens}: together more than the context of "
                f"{self.context}; shorten one of the two."
            )

    def prefill(self, slot: int, prompt: list[int], settings: Settings, number: int = 0):
        """Reads a prompt into a slot, whatever was there; `step` continues it.

        Args:
          slot: which.
          prompt: token ids; START_ID is put in front unless it is there.
          settings: how the text's tokens are chosen.
          number: texts of one prompt, with one seed, differ by it.

        Raises:
          UserError: the prompt leaves no room for a token, or has ids that are none.
        """
        self.check(prompt, 1, settings)
        tokens = with_start(prompt)
        prompted, bias = np.zeros(self.network.vocab_size, bool), np.zeros(self.network.vocab_size, np.float32)
        prompted[prompt] = True
        for token, value in settings.logit_bias.items():
            bias[token] = value
        self._state = _insert(self._state, self._read(tokens), slot, bias, prompted)
        for name in self._table.keys() & vars(settings).keys() - {"seed"}:
            self._table[name][slot] = getattr(settings, name)
        self._table["seed"][slot] = settings.seed >> 32, settings.seed & 0xFFFFFFFF
        self._table["number"][slot], self._table["written"][slot] = number, 0
        self._table["length"][slot], self._table["active"][slot] = len(tokens), 1

    def _read(self, tokens: list[int]) -> tuple:
        """Logits, keys and values of a prompt; those of the last one are kept: several texts may begin with it."""
        if self._last_prompt is None or self._last_prompt[0] != tuple(tokens):
            self._last_prompt = None
            width = min(padded_length(len(tokens) - 1), self.context)
            inputs = np.zeros((1, width), np.int32)
            inputs[0, width - len(tokens) :] = tokens
            read = _read(self.network, self._params, inputs, np.int32(len(tokens)))
            self._last_prompt = tuple(tokens), read
        return self._last_prompt[1]

    def step(self) -> Choice:
        """Chooses the next token of every slot, and begins to read it while the caller looks at the choice."""
        table = {name: values.copy() for name, values in self._table.items()}  # which JAX may read later
        choice, counts = _choose(self._state, table)
        state = dataclasses.replace(self._state, counts=counts)
        self._state = _extend(self.network, self._params, state, choice[0], table["length"])
        self._table["written"] += 1
        self._table["length"] = np.minimum(self._table["length"] + self._table["active"], self.context)
        return Choice(*map(np.asarray, jax.block_until_ready(choice)))

    def release(self, slot: int):
        """Frees a slot: what is computed of it on and on costs nothing that grows."""
        for name, values in _table(1).items():
            self._table[name][slot] = values[0]

    def score(self, prompt: list[int]) -> Choice:
        """How likely each token of a prompt is, given those before it, and what else it could have been.

        Returns:
          a choice whose first axis is the prompt's tokens; of a START_ID in front nothing is known: NaN.
        """
        self.check(prompt, 0)
        tokens = with_start(prompt)
        width = padded_length(len(tokens) - 1)
        inputs, targets, segments = (np.zeros((1, width), np.int32) for _ in range(3))
        inputs[0, : len(tokens) - 1], targets[0, : len(tokens) - 1] = tokens[:-1], tokens[1:]
        segments[0, : len(tokens) - 1] = 1
        network = dataclasses.replace(self.network, max_len=max(self.network.max_len, width))
        scored = _score(network, self._params, inputs, targets, segments)
        log_probs, ids, id_log_probs = (np.asarray(part)[: len(tokens) - 1] for part in scored)
        given = len(prompt) - len(log_probs)  # 1 where the prompt has START_ID itself
        empty = np.zeros((given, MAX_ALTERNATIVES))
        return Choice(
            np.asarray(prompt, np.int32),
            np.concatenate([np.full(given, np.nan, np.float32), log_probs]),
            np.concatenate([empty.astype(np.int32), ids]),
            np.concatenate([empty.astype(np.float32) + np.nan, id_log_probs]),
        )


def with_start(prompt: list[int]) -> list[int]:
    """A prompt's token ids with START_ID in front, as in training."""
    return prompt if prompt and prompt[0] == START_ID else [START_ID, *prompt]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(network: models.TransformerConfig, slots: int, context: int) -> Slots:
    block = min(SLOT_BLOCK, context)
    cache = models.empty_cache(network, slots, -(-context // block) * block)
    zeros = jnp.zeros((slots, network.vocab_size), jnp.float32)
    return Slots(cache.keys, cache.values, zeros, zeros, zeros.astype(jnp.int32), zeros.astype(bool))


@functools.partial(jax.jit, static_argnums=0)
def _read(network, params, inputs, length):
    """Left-padded tokens [1, W] -> logits [1, V], and a layer's keys and values [1, G, W, K], padding behind."""
    width = inputs.shape[1]
    positions = jnp.arange(width)[None] - (width - length)
    cache = models.empty_cache(network, 1, width)
    logits, cache = models.bind(network, params).extend(inputs, jnp.maximum(positions, 0), positions >= 0, cache)
    keys, values = jax.tree.map(lambda x: jnp.roll(x, length - width, axis=2), (cache.keys, cache.values))
    return logits, keys, values


@functools.partial(jax.jit, donate_argnums=0)
def _insert(state: Slots, read, slot, bias, prompted) -> Slots:
    """The slots with one that begins anew."""

    def put(all_slots, one):
        return jax.lax.dynamic_update_slice(all_slots, one, (slot, *[0] * (one.ndim - 1)))

    logits, keys, values = read
    keys, values = jax.tree.map(put, (state.keys, state.values), (keys, values))
    counts = jnp.zeros_like(state.counts[:1])
    rest = ((state.bias, bias[None]), (state.counts, counts), (state.prompted, prompted[None]))
    return Slots(keys, values, put(state.logits, logits), *(put(*pair) for pair in rest))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _extend(network, params, state: Slots, tokens, length) -> Slots:
    """Reads a token [N] of each slot, at its place [N]."""
    valid = jnp.ones((len(tokens), state.keys[0].shape[2]), bool)
    cache = models.Cache(state.keys, state.values, valid, length)
    transformer = models.bind(network, params)
    logits, cache = transformer.extend(tokens[:, None], length[:, None], valid[:, :1], cache)
    return dataclasses.replace(state, logits=logits, keys=cache.keys, values=cache.values)


@jax.jit
def _choose(state: Slots, table):
    """What `Choice` has, and the counts with the choice in them."""
    keys = jax.vmap(lambda seed, *numbers: functools.reduce(jax.random.fold_in, numbers, _key(seed)))(
        table["seed"], table["number"], table["written"]
    )
    tokens = choose(change(state.logits, state.bias, state.counts, state.prompted, table), keys, table)
    log_probs = state.logits - jax.nn.logsumexp(state.logits, axis=-1, keepdims=True)  # [N, V]
    chosen = jnp.take_along_axis(log_probs, tokens[:, None], axis=-1)[:, 0]
    asked = jnp.any(table["alternatives"] > 0)
    best_log_probs, best = jax.lax.cond(asked, _best, lambda x: jax.tree.map(jnp.zeros_like, _best(x)), log_probs)
    counts = state.counts.at[jnp.arange(len(tokens)), tokens].add(1)
    return (tokens, chosen, best, best_log_probs), counts


def _key(seed):
    return jax.random.wrap_key_data(seed, impl="threefry2x32")


def _best(log_probs):
    """The likeliest tokens' log probabilities and ids: [..., V] -> two [..., MAX_ALTERNATIVES]."""
    best, ids = jax.lax.top_k(log_probs, min(MAX_ALTERNATIVES, log_probs.shape[-1]))
    missing = [(0, 0)] * (best.ndim - 1) + [(0, MAX_ALTERNATIVES - best.shape[-1])]
    return jnp.pad(best, missing, constant_values=-jnp.inf), jnp.pad(ids, missing)


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
    top_p, probabilities = table["top_p"][:, None], jax.nn.softmax(logits, axis=-1)
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


@functools.partial(jax.jit, static_argnums=0)
def _score(network, params, inputs, targets, segments):
    """[1, W] -> log probabilities of targets [W], the likeliest tokens there and theirs [W, MAX_ALTERNATIVES]."""
    transformer = models.bind(network, models.stack(params))
    features = transformer.read(inputs, jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape), segments)[0]

    def score(one):
        features, target = one
        log_probs = jax.nn.log_softmax(transformer.to_logits(features))
        best, ids = _best(log_probs)
        return log_probs[target], ids, best

    return jax.lax.map(score, (features, targets[0]), batch_size=SCORED_BLOCK)
