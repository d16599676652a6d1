"""Japanese web text (FineWeb 2), 18 layers x 2048: 1.04 billion parameters, 21 billion tokens.

python3 main.py --workdir=logs/japanese_1.0b_v2 --config=configs/japanese_1.0b_v2.py

Needs the extra `hf`. A step is half a million tokens, which devices that hold fewer rows work through in parts; 8
devices of 16 GB take --config.mesh_fsdp=8. Not trained to its end yet. What it costs, reckoned from 6.8 GFLOP a token:
on one H100 at 41 % of its peak, which llm.c and nanochat reach, 4 days; on a TPU v3-8 at 35 % (not measured) 9.5 days.
The rates come from v2.set_size.
"""

from transformer_lm.configs import v2


def get_config():
    """The v2 recipe on web text, 18 x 2048."""
    config = v2.get_web_config()
    config.train_split = "train[:30000000]"
    config.per_device_batch_size = 4
    config.eval_per_device_batch_size = 4
    v2.set_size(config, layers=18, width=2048, row_length=2048, rows=256)
    return config
