"""Japanese Wikipedia of November 2023 as it lies on the Hugging Face hub, the network of japanese_0.1b_v1.

python3 main.py --workdir=logs/wikipedia_ja --config=configs/wikipedia_ja.py

Needs the extra `hf`, and about the time of japanese_0.1b_v1. Not trained to its end yet: there is no score to expect.
"""

from transformer_lm.configs import base


def get_config():
    """The base recipe, larger, on Wikipedia."""
    config = base.get_config()
    config.max_corpus_chars = 400_000_000
    config.spm_train_options = "--character_coverage=0.9995 --byte_fallback=true"
    config.dataset_name = "huggingface:wikimedia/wikipedia/20231101.ja"
    config.train_split = "train[:99%]"
    config.eval_split = "train[99%:]"
    config.max_target_length = 256
    config.num_layers = 12
    config.emb_dim = 768
    config.qkv_dim = 768
    config.mlp_dim = 3072
    config.num_heads = 12
    config.eval_every_steps = 5_000
    config.max_predict_length = 512
    config.prompts = "日本の首都は"
    return config
