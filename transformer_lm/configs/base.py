"""What all recipes share: every field, its type, and its value in the original's `lm1b_default`.

A recipe calls `get_config()` here and changes what is different; a field that is not here is refused. What each value
may be is said by the dataclass that has the field: `DataConfig`, `TransformerConfig`, `OptimizerConfig`, `TrainConfig`,
`SamplingConfig`.
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    """The base recipe: 6 layers x 512 on lm1b."""
    config = ml_collections.ConfigDict()

    _set_data(config)
    _set_batches_and_devices(config)
    _set_network(config)
    _set_optimizer_and_run(config)
    return config.lock()


def _set_data(config: ml_collections.ConfigDict):
    """Tokenizer, corpus, rows."""
    # Where the SentencePiece model lies, or is written when it is missing; None for workdir/sentencepiece_model.
    config.vocab_path = config_dict.placeholder(str)
    # Pieces of a tokenizer that is trained here, and how many characters of the corpus it learns from.
    config.vocab_size = 30_000
    config.max_corpus_chars = 5_000_000
    # Further options for SentencePiece's trainer, as on its command line.
    config.spm_train_options = "--character_coverage=1.0"

    # A corpus: a name of TensorFlow Datasets ("wiki40b/ja"), "huggingface:OWNER/NAME[/CONFIG]", "text:GLOB",
    # "jsonl:GLOB", "parquet:GLOB", "aozora:GLOB" or "mukashi"; or a mixture of them, [("NAME", weight), ...], where
    # weights are shares of the training tokens. Splits are in the notation of TFDS: "train[:98%]".
    config.dataset_name = config_dict.FieldReference("lm1b", field_type=object)
    config.train_split = "train"
    # None for the training corpus.
    config.eval_dataset_name = config_dict.placeholder(object)
    config.eval_split = "test"
    # Which field of a record holds the document.
    config.text_field = "text"
    # Documents are conversations, in any of the usual forms: the loss is that of the assistant's turns alone, and the
    # model has turns (docs/chat.md).
    config.conversations = False
    # Read Hugging Face datasets from the hub as they are needed, for corpora larger than the disk.
    config.streaming = False
    # From documents to texts: a name in dataset_preprocessor.py; None for the one that belongs to the dataset's name.
    config.preprocessor = config_dict.placeholder(str)
    # "NFKC" and the like; "" to leave texts as they are. (SentencePiece normalizes what it reads in its own way.)
    config.unicode_normalization = ""
    # Rules of cleaning.py that web text must pass, like "language,length,symbols,repetition,minhash"; "" for none.
    config.cleaning_rules = ""
    # Where prepared rows lie, to be shared by several workdirs; None for workdir/prepared.
    config.prepared_dir = config_dict.placeholder(str)
    # Processes of this machine that clean and tokenize; 0 for one a core.
    config.prepare_processes = 0


def _set_batches_and_devices(config: ml_collections.ConfigDict):
    # Rows of a batch on each device.
    config.per_device_batch_size = 32
    config.eval_per_device_batch_size = 32
    # Rows of a training step over all devices; 0 for per_device_batch_size x devices, as counted when the run began.
    config.global_batch_size = 0
    # Parts in which a step's rows are computed, one after the other; 0 for as many as keep a device's rows at
    # per_device_batch_size.
    config.gradient_accumulation_steps = 0
    # Devices over which parameters and optimizer are spread ("fsdp"), and over which each matrix product is ("tensor");
    # the others have copies and rows of their own.
    config.mesh_fsdp = 1
    config.mesh_tensor = 1
    # Tokens of a row.
    config.max_target_length = 128
    config.max_eval_target_length = 512


def _set_network(config: ml_collections.ConfigDict):
    config.num_layers = 6
    config.emb_dim = 512
    config.qkv_dim = 512
    config.mlp_dim = 2048
    config.num_heads = 8
    # Heads of keys and values, each for several of the others (grouped-query attention); 0 for one each.
    config.num_kv_heads = 0
    # "layer" or "rms"; "sinusoidal" or "rope"; "relu", "relu_squared" or "swiglu" (which has a third matrix).
    config.norm = "layer"
    config.positions = "sinusoidal"
    config.rope_base = 10_000.0
    config.mlp = "relu"
    # Normalize queries and keys.
    config.qk_norm = False
    # Biases in the MLP and the logits.
    config.use_bias = True
    # What blocks add, and the logits, begin at zero.
    config.zero_init = False
    # Logits never leave -c to c; 0 for no such cap.
    config.logits_soft_cap = 0.0
    # Logits by the transposed embedding in place of a dense layer of their own.
    config.logits_via_embedding = False
    config.dropout_rate = 0.1
    config.attention_dropout_rate = 0.1
    # "auto", or "xla", "triton", "cudnn", "tpu": which attention is computed with.
    config.attention = "auto"
    # "block": keep of each layer its input alone for the way back, for longer rows and larger networks; "none" keeps
    # what takes time to make again.
    config.remat = "none"
    # Compute in bfloat16 rather than float32; parameters, logits and loss are float32 either way.
    config.use_bfloat16 = True

    # The model to begin with, in place of random parameters: a workdir, an original checkpoint, an exported folder or
    # hf://OWNER/NAME. The run takes its tokenizer; the fields above must be those of its network.
    config.init_from = config_dict.placeholder(str)


def _set_optimizer_and_run(config: ml_collections.ConfigDict):
    # "adamw", or "muon" for the blocks' matrices, with Adam for all else.
    config.optimizer = "adamw"
    config.learning_rate = 0.0016
    config.weight_decay = 0.1
    # Beside Muon: learning rates of the embedding, and of logits, scales and biases.
    config.embedding_learning_rate = 0.2
    config.head_learning_rate = 0.004
    config.adam_b1 = 0.9
    config.adam_b2 = 0.98
    # Linear warm-up, then "rsqrt": inverse square root; "wsd": constant, and linear to zero over the last share of
    # num_train_steps; "cosine": down to zero.
    config.schedule = "rsqrt"
    config.warmup_steps = 1000
    config.decay_share = 0.5
    config.label_smoothing = 0.0

    # Run.
    config.num_train_steps = 500_000
    config.log_every_steps = 100
    config.eval_every_steps = 1_000
    # Batches that an evaluation reads at most; -1 for all. Of a mixture it reads the shares as long as the parts last.
    config.num_eval_steps = 2_000
    # As in the original, whose commands set it, nothing reads it.
    config.num_predict_steps = -1
    config.save_checkpoints = True
    config.restore_checkpoints = True
    config.checkpoint_every_steps = 10_000
    # A checkpoint also when the last one is so many minutes old, whatever the step; 0 for by steps alone.
    config.checkpoint_every_minutes = 30.0
    # How many of the latest checkpoints are kept.
    config.keep_checkpoints = 2
    config.seed = 0

    # Generation: prompts one a line, tokens of prompt and continuation together.
    config.prompts = "I love to "
    config.max_predict_length = 50
    config.sampling_temperature = 0.6
    # Choose among the k likeliest tokens; 0 for all.
    config.sampling_top_k = 20
    # Choose among the likeliest tokens that reach this probability together; 1 for all.
    config.sampling_top_p = 1.0
