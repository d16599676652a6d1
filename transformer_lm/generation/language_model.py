"""A trained model in Python: text in, text and probabilities out.

import transformer_lm
model = transformer_lm.load("logs/my_model")        # or an original checkpoint, or hf://OWNER/NAME
print(model.generate("夏目漱石は、")[0]["text"], model.score(["吾輩は猫である。"])[0].log_prob)
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from transformer_lm import axes, logits, models
from transformer_lm.checkpoints import loading
from transformer_lm.errors import UserError, stage
from transformer_lm.fields import Range, Seed, check_value
from transformer_lm.generation import sampler
from transformer_lm.tokenizer import START_ID, Tokenizer, replace_surrogates
from transformer_lm.tokenizer.turns import Message, Turns
from transformer_lm.transformer_config import check_dtype

BATCH_TOKENS = 4096  # tokens that are scored at once
LENGTH_STEP = 64  # lengths are padded to multiples of it, so that few shapes are compiled
MAX_SCORED_TOKENS = 8192
CACHE_BYTES = 4 << 30  # of keys and values of texts that are written at once
MAX_SAMPLES = 2**16  # continuations of a prompt, which the sampler numbers

SampleCount = Annotated[int, Range(least=0, most=MAX_SAMPLES)]


@dataclasses.dataclass(frozen=True)
class Score:
    """How likely a text is.

    Attributes:
      log_prob: natural logarithm of the text's probability, the sum over its tokens.
      tokens: its token ids.
      token_log_probs: [n] float32, of each token given those before it.
    """

    log_prob: float
    tokens: list[int]
    token_log_probs: np.ndarray


class LanguageModel:
    """A network with its parameters and its tokenizer; made by `load`.

    Attributes:
      network: what computes.
      params: its parameters, on the default device.
      tokenizer: the tokenizer it was trained with.
      step: training steps behind it.
      turns: how it takes turns in a conversation; None for a model that only continues texts.
    """

    def __init__(
        self,
        network: models.TransformerConfig,
        params: models.Params,
        tokenizer: Tokenizer,
        step: int,
        turns: Turns | None = None,
    ):
        self.network, self.params, self.tokenizer, self.step, self.turns = network, params, tokenizer, step, turns

    @functools.cached_property
    def decoding_params(self) -> models.Params:
        """The parameters once more, as `models.for_decoding` makes them; as many bytes."""
        return models.for_decoding(self.params)

    def generate(
        self,
        prompts: str | Iterable[str],
        *,
        num_samples: int = 1,
        max_length: int = 128,
        temperature: float = 0.6,
        top_k: int = 20,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[dict]:
        """Continues texts, in batches; a model that was trained on conversations answers them.

        Args:
          prompts: a text or several.
          num_samples: continuations of each.
          max_length: tokens of prompt and continuation together.
          temperature: logits are divided by it; 0 takes the likeliest token.
          top_k: choose among the k likeliest tokens; 0 for all.
          top_p: choose among the likeliest tokens that reach this probability together; 1 for all.
          seed: the same seed writes the same texts.

        Returns:
          for each prompt `num_samples` dicts, one after the other: prompt, text (prompt and continuation), tokens, and
          finished (whether the text ended by itself).

        Raises:
          UserError: a setting is impossible, or a prompt leaves no room for a new token.
        """
        sampling = sampler.SamplingConfig(temperature, top_k, top_p, max_length)
        texts = self.continue_texts(list_of_texts(prompts, "prompts"), sampling, seed=seed, num_samples=num_samples)
        return list(texts)

    def continue_texts(
        self, prompts: Iterable[str], sampling: sampler.SamplingConfig, *, seed: int, num_samples: int
    ) -> Iterator[dict]:
        """As `generate`, with the settings in one piece; each batch when it is written."""
        parts = (self.network, self.decoding_params, self.tokenizer)
        return generate_texts(*parts, prompts, sampling, seed=seed, num_samples=num_samples, turns=self.turns)

    def chat(
        self,
        messages: Sequence[dict[str, str]],
        *,
        max_length: int | None = None,
        temperature: float = 0.6,
        top_k: int = 20,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """What the assistant says next in a conversation.

        Args:
          messages: objects with role (user, assistant, or at first system) and content; the last one is the user's.
          max_length: tokens of conversation and answer together; None for the model's context.
          temperature, top_k, top_p, seed: as of `generate`.

        Raises:
          UserError: the model was not trained on conversations, the messages are none, or leave no room.
        """
        if self.turns is None:
            raise UserError("This model continues texts; it was not trained on conversations, and cannot answer.")
        ids, _ = self.turns.encode(messages, add_generation_prompt=True)
        most = self.network.context if max_length is None else max_length
        sampling = sampler.SamplingConfig(temperature, top_k, top_p, most)
        check_value("seed", seed, Seed)
        sampler.check_room(len(ids), sampling, "The conversation")
        [[answer]] = sampler.generate(
            self.network, self.decoding_params, [ids], num_samples=1, sampling=sampling, seed=seed
        )
        return self.turns.answer(answer.tokens)

    def score(self, texts: str | Iterable[str], *, with_eos: bool = False) -> list[Score]:
        """How likely each text is as a document's beginning, or with `with_eos` as a whole document.

        Args:
          texts: a text or several.
          with_eos: whether the text's end is scored, too.

        Raises:
          UserError: a text has more than MAX_SCORED_TOKENS tokens.
        """
        texts = list_of_texts(texts, "texts")
        ids = [tokens if with_eos else tokens[:-1] for tokens in self.tokenizer.encode_texts(texts)]
        for text, tokens in zip(texts, ids, strict=True):
            if len(tokens) > MAX_SCORED_TOKENS:
                raise UserError(
                    f"The text {text[:20]!r}... has {len(tokens)} tokens; at most {MAX_SCORED_TOKENS} are scored at "
                    "once: cut it."
                )
        scored = self.score_tokens([[START_ID, *tokens] for tokens in ids])
        return [
            Score(float(np.sum(log_probs, dtype=np.float64)), tokens.tolist(), log_probs)
            for tokens, (log_probs, _) in zip(ids, scored, strict=True)
        ]

    def score_tokens(
        self, sequences: Sequence[Sequence[int]], report: Callable[[int], object] = lambda count: None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """How likely each token of a sequence is, given those before it.

        Args:
          sequences: token ids; the first of each is given, at the beginning of a document START_ID.
          report: is told after each batch how many sequences it had.

        Returns:
          for each sequence of n ids, log probabilities [n - 1] float32 of all but the first, and [n - 1] bool, whether
          no other token was likelier. Sequences are batched by length.
        """
        found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]), reverse=True)
        while order:
            length = -(-max(len(sequences[order[0]]) - 1, 1) // LENGTH_STEP) * LENGTH_STEP
            rows = max(1, BATCH_TOKENS // length)
            numbers, order = order[:rows], order[rows:]
            inputs, targets, segments = (np.zeros((rows, length), np.int32) for _ in range(3))
            for row, number in enumerate(numbers):
                size = len(sequences[number]) - 1
                inputs[row, :size], targets[row, :size] = sequences[number][:-1], sequences[number][1:]
                segments[row, :size] = 1
            network = dataclasses.replace(self.network, max_len=max(self.network.max_len, length))
            with stage("scoring texts", lower="their length"):
                scored = jax.block_until_ready(_score_targets(network, self.params, inputs, targets, segments))
            log_probs, greedy = map(np.asarray, scored)
            for row, number in enumerate(numbers):
                size = len(sequences[number]) - 1
                found[number] = log_probs[row, :size], greedy[row, :size]
            report(len(numbers))
        return [found[number] for number in range(len(sequences))]


def load(address: os.PathLike | str, *, dtype: str = "float32") -> LanguageModel:
    """Loads a model for generation and scoring; no optimizer.

    Args:
      address: a workdir, a folder or file of the original's, an exported folder, or hf://OWNER/NAME[@REVISION].
      dtype: what the network computes in: "float32" or "bfloat16".

    Raises:
      UserError: there is no model, or it cannot be read.
    """
    check_dtype(dtype)
    axes.check_devices()
    with stage("loading the model", lower="the size of the model"):
        loaded = loading.load_model(address)
        tokenizer, turns = loaded.tokenizer()
        network = dataclasses.replace(loaded.config, dtype=dtype)
        return LanguageModel(network, jax.device_put(loaded.params), tokenizer, loaded.step, turns)


def list_of_texts(texts: str | Iterable[str], name: str) -> list[str]:
    """A text or several as a list; raises UserError, with the argument's name, for anything else."""
    texts = [texts] if isinstance(texts, str) else list(texts) if isinstance(texts, Iterable) else [texts]
    for text in texts:
        check_value(name, text, str)
    return texts


@functools.partial(jax.jit, static_argnums=0)
def _score_targets(network: models.TransformerConfig, params: models.Params, inputs, targets, segments):
    """[B, T] log probabilities of targets, and whether they are the likeliest; of padding they mean nothing."""
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
    transformer = models.bind(network, params)
    features = transformer.read(inputs, positions, segments)  # [B, T, D]
    chunks = logits.cut((features, targets), logits.chunks_of(*inputs.shape, network.vocab_size))
    scores = jax.lax.map(lambda chunk: logits.score(transformer.to_logits(chunk[0]), chunk[1]), chunks)
    return jax.tree.map(logits.join, scores)


def generate_texts(
    network: models.TransformerConfig,
    params: models.Params,
    tokenizer: Tokenizer,
    prompts: Iterable[str],
    sampling: sampler.SamplingConfig,
    *,
    seed: int,
    num_samples: int = 1,
    turns: Turns | None = None,
) -> Iterator[dict]:
    """Continues texts: for each prompt `num_samples` dicts of prompt, text, tokens, finished; prompts included.

    As many prompts are a batch as CACHE_BYTES have room for. With turns, a prompt is what the user says, and its text
    ends with a line for the answer. Half a surrogate pair in a prompt is U+FFFD, as the tokenizer reads it.
    """
    check_value("seed", seed, Seed)
    check_value("num_samples", num_samples, SampleCount)
    prompts = [replace_surrogates(prompt) for prompt in prompts]
    ids = check_prompts(tokenizer, prompts, sampling, turns)
    size = _prompts_at_once(network, max(map(len, ids), default=0), num_samples, sampling)

    def write() -> Iterator[dict]:
        options = {"num_samples": num_samples, "sampling": sampling, "seed": seed}
        for first in range(0, len(ids), size):
            batch = slice(first, first + size)
            with stage("generating text", lower="the number of texts for each prompt, or max_predict_length"):
                written = sampler.generate(network, params, ids[batch], first=first, **options)
            for prompt, prompt_ids, texts in zip(prompts[batch], ids[batch], written, strict=True):
                for text in texts:
                    tokens = prompt_ids + text.tokens
                    whole = f"{prompt}\n{turns.answer(text.tokens)}" if turns else tokenizer.decode(tokens)
                    yield {"prompt": prompt, "text": whole, "tokens": tokens, "finished": text.finished}

    return write()


def _prompts_at_once(
    network: models.TransformerConfig, longest: int, num_samples: int, sampling: sampler.SamplingConfig
) -> int:
    """How many prompts of at most so many tokens fit CACHE_BYTES, with their texts."""
    slots = sampler.padded_length(longest) + sampling.max_length
    one = jax.eval_shape(lambda: models.empty_cache(network, num_samples, slots))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((one.keys, one.values)))
    return max(1, CACHE_BYTES // max(1, size))


def check_prompts(
    tokenizer: Tokenizer, prompts: Iterable[str], sampling: sampler.SamplingConfig, turns: Turns | None = None
) -> list[list[int]]:
    """The token ids of prompts, with turns those of what a user says; raises UserError where no token has room."""
    ids = []
    for prompt in prompts:
        ids.append(turns.encode([Message("user", prompt)], True)[0] if turns else tokenizer.encode(prompt))
        sampler.check_room(len(ids[-1]), sampling, f"The prompt {prompt[:20]!r}{'...' * (len(prompt) > 20)}")
    return ids
