"""Texts that begin and end at different times, written side by side: a batch of slots, read into and stepped by hand.

engine = Engine(network, params, slots=8, context=2048)
engine.prefill(0, prompt, Settings(temperature=0.6, seed=1))      # into slot 0; others may be in the midst of a text
choice = engine.step()                                            # one more token of every text
engine.release(0)

`prefill` is `begin`, and `read` until all is read: a long prompt is read in chunks, between which others go on.
What prompts have in common is read once: a slot takes over what lies in another, of texts that have ended, too.

A text depends on its prompt, its settings and its number alone. On CPU that holds bit for bit, whatever stands in the
other slots or stood there before: chunks end at the same places of every prompt, and only whole ones, or whole prompts,
are taken over. On other devices rounding may differ from one slot to another.

Letters in shapes: N slots, C tokens that a slot holds, V vocabulary, G heads of keys and values, K head size, W tokens
of a chunk.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from transformer_lm import models
from transformer_lm.attention import SLOT_BLOCK
from transformer_lm.errors import UserError
from transformer_lm.fields import Range, check_value
from transformer_lm.generation.choosing import MAX_ALTERNATIVES, Settings, change, choose, table_of
from transformer_lm.tokenizer import START_ID

CHUNK_SIZES = (16, 32, 64)  # tokens of a prompt that are read at once; what is less is padded, so that few are compiled
CHUNK = CHUNK_SIZES[-1]


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
      keys, values: one array a layer, [N, G, C, K], C rounded up to whole blocks of attention, with one place to spare.
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


@dataclasses.dataclass
class _Prompt:
    """What the host knows of the prompt in a slot; it stays when the text has ended.

    Attributes:
      tokens: [n] int32, START_ID in front.
      asked: how many of them, counted from the end, were in the request.
      read: of how many the slot has keys and values.
      logits: [V], for the token after them; of use when all are read.
      scores: of each chunk, what `_score` tells of the tokens behind its own; None where nobody asks.
    """

    tokens: np.ndarray
    asked: int
    read: int = 0
    logits: jax.Array | None = None
    scores: list[tuple] | None = None

    @classmethod
    def of(cls, prompt: list[int], *, has_start: bool = False, scored: bool = False) -> "_Prompt":
        """A prompt of token ids, of which nothing has been read."""
        tokens = prompt if has_start else [START_ID, *prompt]  # as in training
        return cls(np.array(tokens, np.int32), len(prompt), scores=[] if scored else None)

    @property
    def left(self) -> int:
        """How many tokens are to be read."""
        return len(self.tokens) - self.read

    def shares(self, other: "_Prompt") -> int:
        """How many tokens in front need not be read, since the other has the same: whole chunks, or all."""
        size = min(other.read, len(self.tokens))
        differs = self.tokens[:size] != other.tokens[:size]
        same = int(np.argmax(differs)) if differs.any() else size
        if same == len(self.tokens) == len(other.tokens):
            return same
        return min(same, len(self.tokens) - 1) // CHUNK * CHUNK


class Engine:
    """A network with a fixed number of slots, each of which holds a text of at most `context` tokens."""

    def __init__(self, network: models.TransformerConfig, params: models.Params, *, slots: int, context: int):
        """The engine; `context` counts the tokens of prompt and continuation together."""
        check_value("slots", slots, Annotated[int, Range(least=1, most=4096)])
        check_value("context", context, Annotated[int, Range(least=1, most=2**20)])
        self.network = dataclasses.replace(network, max_len=max(network.max_len, context + 1))
        self._params, self.slots, self.context = models.for_decoding(params), slots, context
        self.reset()

    def reset(self):
        """Frees all slots, and forgets what was in them."""
        self._prompts = [_Prompt.of([]) for _ in range(self.slots)]
        self._table = table_of(self.slots)
        self._length = np.zeros(self.slots, np.int32)  # tokens read
        self._active = np.zeros(self.slots, bool)  # where a text is being written
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

    def best_slot(self, free: Iterable[int], prompt: list[int], *, has_start: bool = False) -> int:
        """Of free slots that where most of a prompt has been read already, else the first."""
        wanted = _Prompt.of(prompt, has_start=has_start)
        return max(free, key=lambda slot: wanted.shares(self._prompts[slot]))

    def prefill(self, slot: int, prompt: list[int], settings: Settings, number: int = 0):
        """Reads a prompt into a slot, whatever was there; `step` continues it. As `begin`, and all of `read`."""
        self.begin(slot, prompt, settings, number)
        while not self.is_read(slot):
            self.read(slot)

    def begin(
        self,
        slot: int,
        prompt: list[int],
        settings: Settings,
        number: int = 0,
        *,
        has_start: bool = False,
        scored: bool = False,
    ):
        """Gives a slot to a text, whose prompt is to be read.

        Args:
          slot: which.
          prompt: token ids.
          settings: how the text's tokens are chosen.
          number: texts of one prompt, with one seed, differ by it.
          has_start: whether the prompt begins with START_ID, which is else put in front; its value is UNK_ID's, too.
          scored: whether `scores` will be asked for.

        Raises:
          UserError: the prompt is longer than the context, or has ids that are none.
        """
        self.check(prompt, 0, settings)
        asked = _Prompt.of(prompt, has_start=has_start, scored=scored)
        if not scored and (shared := asked.shares(self._prompts[slot])):  # it was here that it was read
            asked.read, asked.logits = shared, self._prompts[slot].logits
        self._prompts[slot] = asked
        prompted, bias = np.zeros(self.network.vocab_size, bool), np.zeros(self.network.vocab_size, np.float32)
        prompted[prompt] = True
        for token, value in settings.logit_bias.items():
            bias[token] = value
        self._state = _begin(self._state, slot, bias, prompted)
        for name in self._table.keys() & vars(settings).keys() - {"seed"}:
            self._table[name][slot] = getattr(settings, name)
        self._table["seed"][slot] = settings.seed >> 32, settings.seed & 0xFFFFFFFF
        self._table["number"][slot], self._table["written"][slot] = number, 0
        self._active[slot] = False

    def is_read(self, slot: int) -> bool:
        """Whether the prompt in a slot has been read, so that its text is being written."""
        return bool(self._active[slot])

    def read(self, slot: int) -> int:
        """Takes over what other slots have of a prompt, or else reads a chunk of it; how many tokens were read."""
        prompt = self._prompts[slot]
        source = max(range(self.slots), key=lambda other: prompt.shares(self._prompts[other]))
        count = 0
        if prompt.scores is None and (shared := prompt.shares(self._prompts[source])) > prompt.read:
            self._state = _copy(self._state, source, slot, np.int32(shared))
            prompt.read, prompt.logits = shared, self._prompts[source].logits
        elif prompt.left:
            count = min(prompt.left, CHUNK)
            prompt.logits = self._read_chunk(slot, prompt, count)
            prompt.read += count
        if not prompt.left:
            self._state = _put_logits(self._state, slot, prompt.logits)
            self._length[slot], self._active[slot] = len(prompt.tokens), True
        return count

    def _read_chunk(self, slot: int, prompt: _Prompt, count: int) -> jax.Array:
        size = next(size for size in CHUNK_SIZES if size >= count)
        inputs, targets = np.zeros((2, size), np.int32)
        part = prompt.tokens[prompt.read :][: count + 1]
        inputs[:count], targets[: len(part) - 1] = part[:count], part[1:]
        place = np.array([slot, prompt.read, count], np.int32)
        self._state, logits, features = _read(self.network, self._params, self._state, inputs, place)
        if prompt.scores is not None:
            scores = _score(self.network, models.head(self.network, self._params), features, targets)
            prompt.scores.append(tuple(np.asarray(score)[: len(part) - 1] for score in scores))
        return logits

    def scores(self, slot: int) -> Choice:
        """How likely each token of a prompt is, given those before it, and what else it could have been.

        Returns:
          a choice whose first axis is the prompt's tokens, which all must have been read; of a START_ID in front
          nothing is known: NaN.
        """
        prompt = self._prompts[slot]
        nothing = np.full((1, MAX_ALTERNATIVES), np.nan, np.float32)
        parts = [(nothing[:, 0], np.zeros_like(nothing, np.int32), nothing), *prompt.scores]
        scores = (np.concatenate(part)[-prompt.asked :][: prompt.asked] for part in zip(*parts, strict=True))
        return Choice(prompt.tokens[-prompt.asked :][: prompt.asked], *scores)

    def step(self) -> Choice:
        """Chooses the next token of every slot, and begins to read it while the caller looks at the choice."""
        table = {name: values.copy() for name, values in self._table.items()}  # which JAX may read later
        choice, counts = _choose(self._state, table)
        state = dataclasses.replace(self._state, counts=counts)
        self._state = _extend(self.network, self._params, state, choice[0], self._length.copy(), self._active.copy())
        self._table["written"] += self._active
        self._length = np.minimum(self._length + self._active, self.context)
        return Choice(*map(np.asarray, jax.block_until_ready(choice)))

    def release(self, slot: int):
        """Frees a slot: what is computed of it on and on costs nothing that grows."""
        for name, values in table_of(1).items():
            self._table[name][slot] = values[0]
        self._active[slot] = False


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(network: models.TransformerConfig, slots: int, context: int) -> Slots:
    block = min(SLOT_BLOCK, -(-(context + 1) // CHUNK) * CHUNK)
    cache = models.empty_cache(network, slots, -(-(context + 1) // block) * block)
    zeros = jnp.zeros((slots, network.vocab_size), jnp.float32)
    return Slots(cache.keys, cache.values, zeros, zeros, zeros.astype(jnp.int32), zeros.astype(bool))


@functools.partial(jax.jit, donate_argnums=0)
def _begin(state: Slots, slot, bias, prompted) -> Slots:
    """The slots with one that is given to another text."""
    return dataclasses.replace(
        state, bias=state.bias.at[slot].set(bias), prompted=state.prompted.at[slot].set(prompted)
    )


@functools.partial(jax.jit, donate_argnums=0)
def _put_logits(state: Slots, slot, logits) -> Slots:
    """The slots with one whose text begins now: what steps chose there while its prompt was read counts for nothing."""
    return dataclasses.replace(state, logits=state.logits.at[slot].set(logits), counts=state.counts.at[slot].set(0))


@functools.partial(jax.jit, donate_argnums=0)
def _copy(state: Slots, source, slot, length) -> Slots:
    """The slots with the first `length` keys and values of one in another, too."""

    def copy_block(number, keys_values):
        def copy(x):  # [N, G, C, K]
            size = (1, x.shape[1], min(SLOT_BLOCK, x.shape[2]), x.shape[3])
            block = jax.lax.dynamic_slice(x, (source, 0, number * size[2], 0), size)
            return jax.lax.dynamic_update_slice(x, block, (slot, 0, number * size[2], 0))

        return jax.tree.map(copy, keys_values)

    blocks = -(-length // min(SLOT_BLOCK, state.keys[0].shape[2]))
    keys, values = jax.lax.fori_loop(0, blocks, copy_block, (state.keys, state.values))
    return dataclasses.replace(state, keys=keys, values=values)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(network, params, state: Slots, inputs, place):
    """Reads tokens [W] into a slot, at places one after the other.

    `place` is [slot, place of the first token, how many tokens there are]; the rest is padding.

    Returns:
      the slots, logits [V] for the token after the last, and what logits are made of [W, D].
    """
    slot, start, count = place
    keys, values = ([jax.lax.dynamic_slice_in_dim(x, slot, 1) for x in xs] for xs in (state.keys, state.values))
    steps = jnp.arange(inputs.shape[0])[None]
    cache = models.Cache(keys, values, jnp.ones((1, keys[0].shape[2]), bool), start[None])
    transformer = models.bind(network, params)
    features, cache = transformer.read_on(inputs[None], start + steps, jnp.ones_like(steps, bool), cache)

    def put(all_slots, one):
        return jax.lax.dynamic_update_slice_in_dim(all_slots, one, slot, axis=0)

    keys, values = jax.tree.map(put, (state.keys, state.values), (cache.keys, cache.values))
    return (
        dataclasses.replace(state, keys=keys, values=values),
        transformer.to_logits(features[0, count - 1]),
        features[0],
    )


@functools.partial(jax.jit, static_argnums=0)
def _score(network, head, features, targets):
    """Log probabilities of targets [W], the likeliest tokens there and theirs [W, MAX_ALTERNATIVES]."""
    log_probs = jax.nn.log_softmax(models.bind(network, head).to_logits(features))  # [W, V]
    best, ids = _best(log_probs)
    return jnp.take_along_axis(log_probs, targets[:, None], axis=-1)[:, 0], ids, best


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _extend(network, params, state: Slots, tokens, length, active) -> Slots:
    """Reads a token [N] of each slot, at its place [N]; those of slots that are not active go where nobody looks."""
    last = state.keys[0].shape[2] - 1
    place = jnp.where(active, length, last)
    cache = models.Cache(state.keys, state.values, jnp.ones((len(tokens), last + 1), bool), place)
    transformer = models.bind(network, params)
    logits, cache = transformer.extend(tokens[:, None], place[:, None], active[:, None], cache)
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
