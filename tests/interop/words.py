"""A model that ends its turn of the conversation in the model card, where marks are words."""

import dataclasses

from test_tensor_tables import config_of, random_params

from transformer_lm.generation import sampler
from transformer_lm.generation.sampler import SamplingConfig
from transformer_lm.huggingface import exported_model, model_card
from transformer_lm.tokenizer.turns import Turns

ANSWER = 5  # tokens before the turn's end


def make_model_that_ends_its_turn(folder, turns: Turns, question: str = model_card.PROMPT) -> int:
    """Writes one of random parameters, but for the columns of logits that are exchanged; returns ANSWER."""
    network = dataclasses.replace(config_of("modern"), vocab_size=turns.tokenizer.vocab_size, max_len=256)
    prompt, _ = turns.encode([{"role": "user", "content": question}], add_generation_prompt=True)
    sampling, end = SamplingConfig(0.0, max_length=len(prompt) + ANSWER + 8), list(turns.marks[-1])

    def write(params) -> list[int]:
        [[text]] = sampler.generate(network, params, [prompt], num_samples=1, sampling=sampling, seed=0)
        return text.tokens

    for seed in range(100):
        params = random_params(network, seed)
        for place, token in enumerate(end, ANSWER):
            written = write(params)
            if place >= len(written):
                break
            columns = params["logits"]["kernel"]
            columns[:, [written[place], token]] = columns[:, [token, written[place]]]
        written = write(params)
        answer = turns.tokenizer.decode(written[:ANSWER])
        if (
            written[ANSWER : ANSWER + len(end)] == end
            and answer.strip()
            and not set("\ufffd" + turns.sign) & set(answer)
        ):
            folder.mkdir()
            exported_model.save(folder, network, params, 1, has_turns=True)
            (folder / "sentencepiece_model").write_bytes(turns.tokenizer.model)
            return ANSWER
    raise AssertionError("no such model among those of 100 seeds")
