"""Japanese web text (cc100), the network of lm1b_default: 0.05B parameters.

python3 main.py --workdir=logs/japanese_default_v1 --config=configs/japanese_default_v1.py

The original: TPU v3-8, half a day, 500,000 steps: loss 4.195, perplexity 66.38.
"""

from transformer_lm.configs import base


def get_config():
    """The base recipe on cc100/ja."""
    config = base.get_config()
    config.spm_train_options = "--character_coverage=0.9995"
    config.dataset_name = "huggingface:cc100/lang=ja"
    config.train_split = "train[:98%]"
    config.eval_dataset_name = "huggingface:cc100/lang=ja"
    config.eval_split = "train[98%:]"
    config.prompts = "昔々あるところに"
    return config
