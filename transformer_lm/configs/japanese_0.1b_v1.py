"""Japanese Wikipedia (wiki40b), 12 layers x 768 after GPT-2 small: 0.13B parameters.

python3 main.py --workdir=logs/japanese_0.1b_v1 --config=configs/japanese_0.1b_v1.py

The original: TPU v3-8, 1.5 days, 500,000 steps: loss 3.562, perplexity 35.22. Its weights are published as
fukugawa/transformer-lm-japanese-0.1b.
"""

from transformer_lm.configs import base


def get_config():
    """The base recipe, larger, on wiki40b/ja."""
    config = base.get_config()
    config.max_corpus_chars = 400_000_000
    config.spm_train_options = "--character_coverage=0.9995 --byte_fallback=true"
    config.dataset_name = "wiki40b/ja"
    config.train_split = "train"
    config.eval_dataset_name = "wiki40b/ja"
    config.eval_split = "validation"
    config.max_target_length = 256
    config.num_layers = 12
    config.emb_dim = 768
    config.qkv_dim = 768
    config.mlp_dim = 3072
    config.num_heads = 12
    config.eval_every_steps = 5_000
    config.max_predict_length = 512
    config.prompts = "昔々あるところに"
    return config
