"""What the v2 recipes share: a network and an optimizer of today, and how their numbers follow from a few.

docs/recipes.md has what each ingredient brings, measured at a size that two cores can train; the rules from there to
other sizes are those that nanochat publishes (github.com/karpathy/nanochat), which were found at 12 to 32 layers.
"""

import ml_collections

from transformer_lm.configs import base

HEAD_SIZE = 64
TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022
REFERENCE_WIDTH, REFERENCE_BATCH = 768, 2**19  # emb_dim, and tokens of a step, at which the rates below hold


def get_config() -> ml_collections.ConfigDict:
    """The base recipe with the network of Qwen3, and Muon."""
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
    config.decay_share = 0.5
    return config
