"""Japanese instructions (Dolly, OpenAssistant 2; translated), on top of `japanese_0.1b_v2`: a model that answers.

python3 main.py --workdir=logs/japanese_0.1b_v2_chat --config=configs/japanese_0.1b_v2_chat.py \
    --config.init_from=logs/japanese_0.1b_v2

Needs the extra `hf`. docs/chat.md has the data and their licences. Not trained yet; the rates are a tenth of those that
a base model would have with this batch, 3.5 % of those of `japanese_0.1b_v2`, whose batch is eight times as large.
"""

from transformer_lm.configs import v2


def get_config():
    """The v2 recipe of the same size, gone on with on conversations."""
    config = v2.get_web_config()
    v2.set_size(config, layers=12, width=768, row_length=1024, rows=64)
    config.init_from = "logs/japanese_0.1b_v2"
    config.conversations = True
    config.streaming = False
    config.dataset_name = [
        ("huggingface:llm-jp/databricks-dolly-15k-ja", 1.0),
        ("huggingface:llm-jp/oasst2-33k-ja", 3.0),
    ]
    config.train_split = "train[:98%]"
    config.eval_split = "train[98%:]"
    config.per_device_batch_size = 16
    config.eval_per_device_batch_size = 16
    for name in ("learning_rate", "embedding_learning_rate", "head_learning_rate"):
        config[name] *= 0.1
    config.num_train_steps = 600
    config.eval_every_steps = 100
    config.checkpoint_every_steps = 100
    config.prompts = "日本で一番高い山は何ですか。\n猫が出てくる短い昔話を書いてください。"
    return config
