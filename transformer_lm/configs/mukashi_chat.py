"""Conversations about folk tales (`corpora/mukashi_chat.py`), on top of the recipe `mukashi`: what `make chat` trains.

python3 main.py --workdir=logs/mukashi_chat --config=configs/mukashi_chat.py --config.init_from=logs/mukashi

It follows all of 426 instructions in wordings that it never saw (instruction_accuracy), after 5 minutes on 2 CPU cores.
"""

from transformer_lm.configs import mukashi


def get_config():
    """The recipe of the tales, gone on with on conversations."""
    config = mukashi.get_config()
    config.init_from = "logs/mukashi"
    config.dataset_name = "mukashi_chat"
    config.eval_split = "validation"
    config.conversations = True
    config.decay_share = 1.0  # what was learned of tales has to give way at first; then the rates go down
    config.per_device_batch_size = 8
    config.max_target_length = 272
    config.num_train_steps = 400
    config.eval_every_steps = 400
    config.checkpoint_every_steps = 200
    config.num_eval_steps = 8
    config.prompts = "猿が出てくる昔話をお願いします。"
    config.max_predict_length = 272
    return config
