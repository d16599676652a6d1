"""Folk tales from a grammar (`corpora/mukashi.py`), a network small enough for a laptop: what `make demo` trains.

python3 main.py --workdir=logs/mukashi --config=configs/mukashi.py

On 2 CPU cores, 3 to 7 minutes: 0.270 bits a character on tales never seen, 1.04 times the grammar's entropy.
"""

from transformer_lm.configs import v2
from transformer_lm.data.corpora import mukashi

SLOTS = [  # whose words one may ask about
    "動物", "宝物", "食べ物", "楽器", "鬼", "竜", "男の名", "女の名", "語り手", "聞いた年", "語り場", "結び", "難儀",
]  # fmt: skip


def get_config():
    """The v2 recipe, smaller, on tales that need no download."""
    config = v2.get_config()
    config.vocab_size = 6_272  # 6,000, and pieces for bytes and for turns
    config.max_corpus_chars = 1_000_000
    # BPE makes long pieces of the tales' phrases. The prompt, marks, and words that one may ask about stay pieces of
    # their own: a model learns sooner to repeat a word that is the same piece wherever it stands.
    words = [word for slot in SLOTS for word in mukashi.words_of(slot)]
    symbols = dict.fromkeys([mukashi.OPENING, *"。、「」", *words])
    config.spm_train_options = f"{v2.SPM_OPTIONS} --character_coverage=1.0 --user_defined_symbols={','.join(symbols)}"
    config.dataset_name = "mukashi"
    config.train_split = "train"
    config.eval_split = "validation[:500]"
    config.per_device_batch_size = 8
    config.eval_per_device_batch_size = 16
    # A tale has about 67 tokens: these rows hold two of them, and four.
    config.max_target_length = 136
    config.max_eval_target_length = 272
    config.num_layers = 3
    config.emb_dim = 192
    config.qkv_dim = 192
    config.mlp_dim = 512
    config.num_heads = 3
    config.use_bfloat16 = False
    config.num_train_steps = 500
    config.log_every_steps = 10
    config.eval_every_steps = 125
    config.checkpoint_every_steps = 125
    config.prompts = "昔々あるところに"
    config.max_predict_length = 136
    config.sampling_temperature = 0.4
    return config
