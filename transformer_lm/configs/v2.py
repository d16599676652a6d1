"""What the v2 recipes share: a network and an optimizer of today, and their sizes from one number."""

import ml_collections

from transformer_lm.configs import base


def get_config() -> ml_collections.ConfigDict:
    """The base recipe with the network of Qwen3 and with Muon; docs/recipes.md has what each of them brings."""
    config = base.get_config()
    config.norm = "rms"
    config.positions = "rope"
    config.mlp = "swiglu"
    config.qk_norm = True
    config.use_bias = False
    config.zero_init = True
    config.dropout_rate = 0.0
    config.attention_dropout_rate = 0.0

    config.optimizer = "muon"
    config.learning_rate = 0.02
    config.embedding_learning_rate = 0.2
    config.head_learning_rate = 0.004
    config.adam_b1 = 0.8
    config.adam_b2 = 0.95
    config.weight_decay = 0.0
    config.schedule = "wsd"
    config.warmup_steps = 10
    return config
