"""Japanese web text (FineWeb 2), 12 layers x 768: 0.13 billion parameters, 2.7 billion tokens.

python3 main.py --workdir=logs/japanese_0.1b_v2 --config=configs/japanese_0.1b_v2.py

Needs the extra `hf`. A step is half a million tokens, which devices that hold fewer rows work through in parts. Not
trained to its end yet. What it costs, reckoned from 0.77 GFLOP a token: on one H100 at 41 % of its peak, which llm.c
and nanochat reach, 1.4 hours; on a TPU v3-8 at 35 % (not measured) 3.3 hours. The rates come from v2.set_size.
"""

from transformer_lm.configs import v2


def get_config():
    """The v2 recipe on web text, 12 x 768."""
    config = v2.get_web_config()
    config.train_split = "train[:4000000]"
    config.per_device_batch_size = 16
    config.eval_per_device_batch_size = 16
    v2.set_size(config, layers=12, width=768, row_length=1024, rows=512)
    return config
