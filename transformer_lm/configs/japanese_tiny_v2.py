"""Literature (Aozora Bunko), 4 layers x 256: a first real language model on a laptop. 7 million parameters.

python3 main.py --workdir=logs/japanese_tiny_v2 --config=configs/japanese_tiny_v2.py

Needs the extra `hf`, or literature of your own: --config.dataset_name=jsonl:FILE.
The rates were measured at this size (docs/recipes.md); a run is 4 million tokens, which two cores read in an hour.
"""

from transformer_lm.configs import v2


def get_config():
    """The v2 recipe at the size that its ingredients were measured at."""
    config = v2.get_config()
    config.vocab_size = 8_000
    config.spm_train_options = v2.SPM_OPTIONS
    config.dataset_name = "huggingface:globis-university/aozorabunko-clean"
    config.train_split = "train[:99%]"
    config.eval_split = "train[99%:]"
    config.num_layers = 4
    config.emb_dim = 256
    config.qkv_dim = 256
    config.mlp_dim = 768
    config.num_heads = 4
    config.max_target_length = 256
    config.max_eval_target_length = 256
    config.per_device_batch_size = 16
    config.eval_per_device_batch_size = 32
    config.use_bfloat16 = False
    config.num_train_steps = 1_000
    config.log_every_steps = 20
    config.eval_every_steps = 250
    config.num_eval_steps = 20
    config.checkpoint_every_steps = 250
    config.prompts = "吾輩は猫である。\n昔々あるところに"
    config.max_predict_length = 128
    return config
