"""Prefill, then cached decoding in one compiled loop: token ids in, token ids out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from transformer_lm import models
from transformer_lm.errors import UserError
from transformer_lm.fields import CountOrZero, Length, NotNegative, Share, check
from transformer_lm.tokenizer import EOS_ID

PROMPT_BUCKET = 16  # prompts are padded to multiples of this, long ones of more, so that few shapes are compiled
SMALLEST_TEMPERATURE = 1e-6  # below it the likeliest token is as good as certain, and float32 too narrow to divide by


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen, and for how long."""

    temperature: NotNegative = 1.0  # logits are divided by it; 0 takes the likeliest token (greedy)
    top_k: CountOrZero = 0  # choose among the k likeliest tokens; 0 for all
    # Choose among the fewest likeliest tokens whose probabilities, after temperature and top_k, reach top_p together
    # (nucleus sampling, Holtzman et al. 2020); 1 for all.
    top_p: Share = 1.0
    max_length: Length = 128  # tokens of prompt and continuation together

    def __post_init__(self):
        check(self)


@dataclasses.dataclass(frozen=True)
class Continuation:
    """One generated text.

    Attributes:
      tokens: the new token ids, without the prompt and without EOS.
      finished: whether it ended by EOS rather than for want of room.
    """

    tokens: list[int]
    finished: bool


def padded_length(length: int) -> int:
    """How many tokens a prompt of `length` is padded to with its start: at most a quarter more than it has."""
    bucket = max(PROMPT_BUCKET, 2 ** (length.bit_length() - 3))
    return -(-(length + 1) // bucket) * bucket


def check_room(length: int, sampling: SamplingConfig, prompt: str = "A prompt"):
    """Raises UserError if a prompt of `length` tokens leaves no room for a new one."""
    if length >= sampling.max_length:
        raise UserError(
            f"{prompt} of {length} tokens leaves no room to write: max_predict_length={sampling.max_length} "
            "counts prompt and continuation; raise it."
        )


def generate(
    network: models.TransformerConfig,
    params: models.Params,
    prompts: list[list[int]],
    *,
    num_samples: int,
    sampling: SamplingConfig,
    seed: int,
    first: int = 0,
) -> list[list[Continuation]]:
    """Continues every prompt `num_samples` times, all in one batch.

    A text depends on the seed, the number of its prompt and its own number alone, not on how many others there are.

    Args:
      network: what computes.
      params: its parameters; texts are written faster with what `models.for_decoding` makes of them.
      prompts: token ids without EOS; an empty prompt begins a new text.
      num_samples: texts a prompt.
      sampling: how tokens are chosen.
      seed: of the random choices.
      first: number of the first prompt.

    Returns:
      for each prompt its texts.

    Raises:
      UserError: a prompt leaves no room for a new token.
    """
    if not prompts or not num_samples:
        return [[] for _ in prompts]
    longest = max(map(len, prompts))
    check_room(longest, sampling)
    # Every text begins with id 0, as in training; shorter prompts are padded on the left.
    width = padded_length(longest)
    inputs = np.zeros((len(prompts), width), np.int32)
    lengths = np.array([len(prompt) + 1 for prompt in prompts], np.int32)
    for row, prompt in zip(inputs, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    limits = sampling.max_length - lengths + 1  # how many tokens each prompt may be continued by
    network = dataclasses.replace(network, max_len=max(network.max_len, sampling.max_length))
    tokens = _generate(
        network, sampling, num_samples, params, inputs, lengths, limits, np.uint32(first), jax.random.key(seed)
    )
    # Waited for, since what memory was exhausted for would abort the process on its way to NumPy.
    tokens = np.asarray(jax.block_until_ready(tokens))  # [prompts, num_samples, max_length]
    return [[_cut(text[:limit].tolist()) for text in texts] for texts, limit in zip(tokens, limits, strict=True)]


def _cut(tokens: list[int]) -> Continuation:
    if EOS_ID in tokens:
        return Continuation(tokens[: tokens.index(EOS_ID)], True)
    return Continuation(tokens, False)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(network, sampling, num_samples, params, inputs, lengths, limits, first, key):
    """[P, W] left-padded prompts -> [P, num_samples, max_length] ids; those after EOS or a limit mean nothing."""
    num_prompts, width = inputs.shape
    offset = width - lengths[:, None]  # [P, 1] padding before each prompt
    positions = jnp.arange(width) - offset  # [P, W]
    cache = models.empty_cache(network, num_prompts, width + sampling.max_length)
    logits, cache = models.bind(network, params).extend(inputs, jnp.maximum(positions, 0), positions >= 0, cache)

    def repeat(x):
        return jnp.repeat(x, num_samples, axis=0) if x.ndim else x

    logits, cache = jax.tree.map(repeat, (logits, cache))  # [B, V], B = P * num_samples
    lengths, limits = repeat(lengths), repeat(limits)
    numbers = first + jnp.arange(num_prompts, dtype=jnp.uint32)[:, None]  # [P, 1]
    rows = jnp.arange(num_samples, dtype=jnp.uint32) + numbers * 2**16
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(rows.reshape(-1))  # [B]
    high = repeat(numbers[:, 0] >> 16)  # [B], what has no room in a row's number
    keys = jnp.where(high > 0, jax.vmap(jax.random.fold_in)(keys, high), keys)

    def unfinished(state):
        return ~jnp.all(state[-1])

    def write_token(state):
        step, logits, cache, tokens, done = state
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        token = sample(logits, step_keys, sampling)  # [B]
        tokens = tokens.at[:, step].set(token)
        done |= (token == EOS_ID) | (step + 1 >= limits)
        valid = jnp.ones((len(token), 1), bool)
        logits, cache = models.bind(network, params).extend(token[:, None], (lengths + step)[:, None], valid, cache)
        return step + 1, logits, cache, tokens, done

    tokens = jnp.zeros((len(keys), sampling.max_length), jnp.int32)
    state = (0, logits, cache, tokens, jnp.zeros(len(keys), bool))
    tokens = jax.lax.while_loop(unfinished, write_token, state)[3]
    return tokens.reshape(num_prompts, num_samples, -1)


def sample(logits: jax.Array, keys: jax.Array, sampling: SamplingConfig) -> jax.Array:
    """Chooses a token a row: logits [B, V], one key a row [B] -> ids [B]."""
    if sampling.temperature < SMALLEST_TEMPERATURE:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    vocab_size = logits.shape[-1]
    top_k = min(sampling.top_k or vocab_size, vocab_size)
    if top_k == vocab_size and sampling.top_p == 1:
        return jax.vmap(jax.random.categorical)(keys, logits / sampling.temperature).astype(jnp.int32)
    logits, ids = jax.lax.top_k(logits / sampling.temperature, top_k)  # [B, k], likeliest first
    probabilities = jax.nn.softmax(logits, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # probability of all likelier tokens
    logits = jnp.where(before < sampling.top_p, logits, -jnp.inf)
    choice = jax.vmap(jax.random.categorical)(keys, logits)
    return jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
