"""Japanese web text (FineWeb 2), read from the Hugging Face hub without a copy; the network of japanese_0.1b_v1.

python3 main.py --workdir=logs/fineweb2_ja --config=configs/fineweb2_ja.py

Needs the extra `hf`. It is far more text than this network needs: narrow train_split ("train[:10000000]"), or prepare
it on many machines (docs/en/cluster.md). Not trained to its end yet: there is no score to expect.
"""

from transformer_lm.configs import wikipedia_ja


def get_config():
    """The recipe wikipedia_ja on web text."""
    config = wikipedia_ja.get_config()
    config.dataset_name = "huggingface:HuggingFaceFW/fineweb-2/jpn_Jpan"
    config.streaming = True
    config.train_split = "train"
    config.eval_split = "test"
    return config
