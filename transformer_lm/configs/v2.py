"""What the v2 recipes share: a network and an optimizer of today, and how their numbers follow from a few.

docs/recipes.md has what each ingredient brings, measured at a size that two cores can train.
"""

import ml_collections

from transformer_lm.configs import base

# Of the tokenizer: what SentencePiece, a fast tokenizer and llama.cpp cut alike, with pieces for all bytes, so that
# nothing is unknown, and 16 control pieces that no text can hold, for turns of a conversation.
SPM_OPTIONS = " ".join([
    "--model_type=bpe --byte_fallback=true --character_coverage=0.9995 --normalization_rule_name=identity",
    "--remove_extra_whitespaces=false --add_dummy_prefix=false",
    f"--control_symbols={','.join(f'<|reserved_{number}|>' for number in range(16))}",
])  # fmt: skip
HEAD_SIZE = 64
TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022, table 3


def get_config() -> ml_collections.ConfigDict:
    """The base recipe with the network of Qwen3, and with Muon."""
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
    config.embedding_learning_rate = 0.4
    config.head_learning_rate = 0.015
    config.adam_b1 = 0.8
    config.adam_b2 = 0.95
    config.weight_decay = 0.0
    config.schedule = "wsd"
    config.warmup_steps = 10
    config.decay_share = 0.5
    return config


def get_web_config() -> ml_collections.ConfigDict:
    """The v2 recipe on FineWeb 2."""
    config = get_config()
    config.vocab_size = 32_000
    config.max_corpus_chars = 400_000_000
    config.spm_train_options = SPM_OPTIONS
    config.dataset_name = "huggingface:HuggingFaceFW/fineweb-2/jpn_Jpan"
    config.streaming = True
    config.eval_split = "test"
    config.num_eval_steps = 100
    config.eval_every_steps = 1_000
    config.checkpoint_every_steps = 1_000
    config.prompts = "昔々あるところに\n日本の首都は"
    config.max_predict_length = 256
    return config


def set_size(config: ml_collections.ConfigDict, *, layers: int, width: int, row_length: int, rows: int):
    """Gives a recipe another size: what follows from depth, width and batch.

    The rates are those that nanochat (github.com/karpathy/nanochat, runs of 12 to 32 layers) has at a width of 768
    and a batch of 2^19 tokens, and so are the rules from there: Muon's updates fit any width by themselves, Adam's
    rates go with 1 / sqrt(width), decay with 1 / width^2, and all rates with the square root of the batch. They
    hold for runs of thousands of steps; short runs of small networks want more (docs/recipes.md).

    Args:
      config: a v2 recipe, with its vocab_size.
      layers, width: of the network.
      row_length: tokens of a row.
      rows: of a step.
    """
    config.num_layers = layers
    config.emb_dim = config.qkv_dim = width
    config.num_heads = width // HEAD_SIZE
    config.mlp_dim = -(-8 * width // (3 * 128)) * 128  # three matrices with as many weights as two of 4 * width
    config.max_target_length = config.max_eval_target_length = row_length
    config.global_batch_size = rows
    config.num_train_steps = TOKENS_PER_PARAMETER * _parameters(config) // (rows * row_length)

    by_batch = (rows * row_length / 2**19) ** 0.5
    by_width = (width / 768) ** -0.5
    config.learning_rate = 0.02 * by_batch
    config.embedding_learning_rate = 0.3 * by_batch * by_width
    config.head_learning_rate = 0.008 * by_batch * by_width
    config.weight_decay = 0.2 * (768 / width) ** 2
    config.decay_share = 0.65


def _parameters(config: ml_collections.ConfigDict) -> int:
    """Matrices of the network; scales are a thousandth."""
    block = 4 * config.emb_dim * config.qkv_dim + 3 * config.emb_dim * config.mlp_dim
    return config.num_layers * block + 2 * config.vocab_size * config.emb_dim
