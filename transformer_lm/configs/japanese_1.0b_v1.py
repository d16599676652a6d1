"""Japanese Wikipedia (wiki40b), 18 layers x 2048: 1.0B parameters.

python3 main.py --workdir=logs/japanese_1.0b_v1 --config=configs/japanese_1.0b_v1.py

Parameters, gradients and optimizer state take 16 GB in float32 on every device, activations come on top.
"""

from transformer_lm.configs import base


def get_config():
    """The base recipe, much larger, on wiki40b/ja."""
    config = base.get_config()
    config.max_corpus_chars = 400_000_000
    config.spm_train_options = "--character_coverage=0.9995 --byte_fallback=true"
    config.dataset_name = "wiki40b/ja"
    config.train_split = "train"
    config.eval_dataset_name = "wiki40b/ja"
    config.eval_split = "validation"
    config.per_device_batch_size = 16
    config.eval_per_device_batch_size = 16
    config.max_target_length = 1024
    config.max_eval_target_length = 1024
    config.num_layers = 18
    config.emb_dim = 2048
    config.qkv_dim = 2048
    config.mlp_dim = 8192
    config.num_heads = 16
    config.eval_every_steps = 5_000
    config.prompts = "日本の首都は"
    return config
