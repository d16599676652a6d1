"""The original's reproduction of Flax's lm1b example: English, 0.05B parameters.

python3 main.py --workdir=logs/lm1b_default --config=configs/lm1b_default.py

The original: TPU v3-8, half a day, 500,000 steps: loss 3.121, perplexity 22.67.
"""

from transformer_lm.configs import base


def get_config():
    """The base recipe, with its evaluation corpus spelt out."""
    config = base.get_config()
    config.eval_dataset_name = "lm1b"
    return config
