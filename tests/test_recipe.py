"""The recipes: the original's values, field by field, and what is refused."""

import importlib.util

import pytest
from etils import epath

from transformer_lm import recipe
from transformer_lm.configs import base
from transformer_lm.errors import UserError

NAMES = ["lm1b_default", "japanese_default_v1", "japanese_0.1b_v1", "japanese_1.0b_v1"]
BYTES = "--character_coverage=0.9995 --byte_fallback=true"

# What the original's four files say, in the order of NAMES; one value stands for all.
ORIGINAL = {
    "vocab_path": None,
    "vocab_size": 30_000,
    "max_corpus_chars": (5e6, 5e6, 4e8, 4e8),
    "spm_train_options": ("--character_coverage=1.0", "--character_coverage=0.9995", BYTES, BYTES),
    "dataset_name": ("lm1b", "huggingface:cc100/lang=ja", "wiki40b/ja", "wiki40b/ja"),
    "train_split": ("train", "train[:98%]", "train", "train"),
    "eval_dataset_name": ("lm1b", "huggingface:cc100/lang=ja", "wiki40b/ja", "wiki40b/ja"),
    "eval_split": ("test", "train[98%:]", "validation", "validation"),
    "per_device_batch_size": (32, 32, 32, 16),
    "eval_per_device_batch_size": (32, 32, 32, 16),
    "sampling_temperature": 0.6,
    "sampling_top_k": 20,
    "num_train_steps": 500_000,
    "num_eval_steps": 2_000,
    "num_predict_steps": -1,
    "learning_rate": 0.0016,
    "warmup_steps": 1000,
    "label_smoothing": 0.0,
    "weight_decay": 0.1,
    "max_target_length": (128, 128, 256, 1024),
    "max_eval_target_length": (512, 512, 512, 1024),
    "max_predict_length": (50, 50, 512, 50),
    "logits_via_embedding": False,
    "num_layers": (6, 6, 12, 18),
    "emb_dim": (512, 512, 768, 2048),
    "qkv_dim": (512, 512, 768, 2048),
    "mlp_dim": (2048, 2048, 3072, 8192),
    "num_heads": (8, 8, 12, 16),
    "dropout_rate": 0.1,
    "attention_dropout_rate": 0.1,
    "save_checkpoints": True,
    "restore_checkpoints": True,
    "checkpoint_every_steps": 10_000,
    "eval_every_steps": (1_000, 1_000, 5_000, 5_000),
    "use_bfloat16": True,
    "seed": 0,
    "prompts": ("I love to ", "昔々あるところに", "昔々あるところに", "日本の首都は"),
}


def load(name):
    """A recipe by the path of its file, as the commands load it (a name with a dot cannot be imported)."""
    path = f"{base.__file__.removesuffix('base.py')}{name}.py"
    spec = importlib.util.spec_from_file_location("a_recipe", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.mark.parametrize("name", NAMES)
def test_values_of_the_original(name):
    config = load(name)
    for field, values in ORIGINAL.items():
        assert config[field] == (values[NAMES.index(name)] if isinstance(values, tuple) else values), field
    recipe.read(config)


@pytest.mark.parametrize("name", [*NAMES, "mukashi", "wikipedia_ja", "fineweb2_ja"])
def test_recipes_have_the_fields_of_the_base(name):
    assert set(load(name)) == set(base.get_config())
    recipe.read(load(name))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_beyond_the_original_is_on(name):
    data = recipe.read(load(name)).data
    assert (data.unicode_normalization, data.cleaning_rules, data.streaming, data.preprocessor) == ("", "", False, None)


def test_every_field_reaches_its_room():
    config = load("japanese_0.1b_v1")
    config.prompts = "一\n二"
    config.use_bfloat16 = False
    read = recipe.read(config)
    assert read.prompts == ("一", "二")
    assert read.model.dtype == "float32"
    assert read.model.max_len == 512
    assert (read.sampling.temperature, read.sampling.top_k, read.sampling.max_length) == (0.6, 20, 512)
    assert read.optimizer.learning_rate == 0.0016
    assert read.train.eval_every_steps == 5_000
    assert read.data.max_corpus_chars == 4e8


@pytest.mark.parametrize("content", ["", "[]", '{"recipe": 3}', '{"a":' * 10_000])
def test_broken_config_json(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json is not "):
        recipe.read_saved(epath.Path(tmp_path / "config.json"))


def test_config_json_of_an_exported_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert recipe.read_saved(epath.Path(tmp_path / "config.json")) == {}
