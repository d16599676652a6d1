"""How often a model does what it is told, where the data can tell: the metric `instruction_accuracy`."""

import itertools
import json
from collections.abc import Iterator

from transformer_lm import models
from transformer_lm.data.corpora import Documents
from transformer_lm.generation import sampler
from transformer_lm.tokenizer.turns import Turns

MAX_CONVERSATIONS = 100  # of which every answer is judged
BATCH = 128  # answers that are written at once


def measure(
    network: models.TransformerConfig, params: models.Params, turns: Turns, documents: Documents
) -> dict[str, float]:
    """The share of instructions that are followed, each behind the true conversation until then.

    Args:
      network: what computes.
      params: its parameters.
      turns: how it takes turns.
      documents: conversations of a source that judges.
    """
    asked = list(_instructions(documents))
    prompts = [turns.encode(messages[:-1], add_generation_prompt=True)[0] for messages in asked]
    answers = [turns.encode(messages[-2:])[0] for messages in asked]
    longest = max(map(len, prompts)) + max(map(len, answers))
    sampling = sampler.SamplingConfig(temperature=0.0, max_length=longest)
    followed, rows = 0, min(BATCH, len(asked))
    for start in range(0, len(asked), rows):
        batch = prompts[start : start + rows]
        batch += [max(prompts, key=len)] * (rows - len(batch))  # always one shape, compiled once
        written = sampler.generate(network, params, batch, num_samples=1, sampling=sampling, seed=0)
        for messages, [answer] in zip(asked[start : start + rows], written, strict=False):
            followed += documents.source.judge(messages, turns.answer(answer.tokens))
    return {"instruction_accuracy": followed / len(asked)}


def _instructions(documents: Documents) -> Iterator[list[dict]]:
    """Conversations that end with the answer to an instruction."""
    for document in itertools.islice(documents, MAX_CONVERSATIONS):
        messages = json.loads(document)
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                yield messages[: number + 1]
