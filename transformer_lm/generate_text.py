"""Generate text with a trained model.

python3 generate_text.py --workdir=logs/japanese_0.1b_v1 --config=configs/japanese_0.1b_v1.py \
    --config.sampling_temperature=0.6 --config.sampling_top_k=20 --config.seed=0 \
    --config.prompts="夏目漱石は、" --num_generated_texts=10

--workdir is a workdir of main.py, a folder with the original's checkpoint_N and sentencepiece_model, such a
checkpoint_N, a folder that export_huggingface.py wrote, or a model of the Hugging Face hub:
hf://fukugawa/transformer-lm-japanese-0.1b@v1. The network is the one that lies there; of the recipe only sampling_*,
max_predict_length, prompts (one a line), use_bfloat16 and seed count.
Without --config, the workdir's own recipe is taken.
"""

import json

from absl import flags, logging
from ml_collections import ConfigDict

from transformer_lm import cli, recipe
from transformer_lm.generation import language_model

_NUM_GENERATED_TEXTS = flags.DEFINE_integer(
    "num_generated_texts", 10, "Texts to generate for each prompt.", 1, language_model.MAX_SAMPLES
)
_OUTPUT = flags.DEFINE_enum(
    "output", "log", ["log", "jsonl"], "log: lines 'Sample: ...' in the log; jsonl: one JSON object a text on stdout."
)


def main(config: ConfigDict, workdir: str):
    """Continues the recipe's prompts with the workdir's model."""
    chosen = recipe.read(config)
    model = language_model.load(workdir, dtype=chosen.network.dtype)
    logging.info("Generating text with the model of step %d.", model.step)
    number = _NUM_GENERATED_TEXTS.value
    texts = model.continue_texts(chosen.prompts, chosen.sampling, seed=chosen.seed, num_samples=number)
    for text in texts:
        if _OUTPUT.value == "jsonl":
            print(json.dumps(text, ensure_ascii=False), flush=True)
        else:
            logging.info("Sample: %s", text["text"])


if __name__ == "__main__":
    cli.run(main, needs_config=False)
