"""Japanese web text (FineWeb 2), 24 layers x 1024: 0.37 billion parameters, 7.5 billion tokens.

python3 main.py --workdir=logs/japanese_0.4b_v2 --config=configs/japanese_0.4b_v2.py

Needs the extra `hf`. A step is half a million tokens, which devices that hold fewer rows work through in parts; 8
devices of 16 GB take --config.mesh_fsdp=8. Not trained to its end yet. What it costs, reckoned from 2.3 GFLOP a token:
on one H100 at 41 % of its peak, which llm.c and nanochat reach, 12 hours; on a TPU v3-8 at 35 % (not measured) 28.
The rates come from v2.set_size.
"""

from transformer_lm.configs import v2


def get_config():
    """The v2 recipe on web text, 24 x 1024."""
    config = v2.get_web_config()
    config.train_split = "train[:11000000]"
    config.per_device_batch_size = 8
    config.eval_per_device_batch_size = 8
    v2.set_size(config, layers=24, width=1024, row_length=1024, rows=512)
    return config
