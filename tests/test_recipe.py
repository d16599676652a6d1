"""The recipes: the original's values, field by field, and what is refused."""

import dataclasses
import importlib.util
import re

import pytest
from etils import epath
from ml_collections import ConfigDict

from transformer_lm import recipe
from transformer_lm.checkpoints.workdir import check_same_network
from transformer_lm.configs import base
from transformer_lm.data.preparation import DataConfig
from transformer_lm.errors import UserError
from transformer_lm.generation.sampler import SamplingConfig
from transformer_lm.models import TransformerConfig, count_params
from transformer_lm.training.config import Recipe, TrainConfig
from transformer_lm.training.flops import flops_per_token
from transformer_lm.training.optimizers import OptimizerConfig

V2_NAMES = [f"japanese_{size}_v2" for size in ("tiny", "0.1b", "0.4b", "1.0b")]
OTHERS = ["mukashi", "mukashi_chat", "japanese_0.1b_v2_chat", "wikipedia_ja", "fineweb2_ja"]
EXCEPTIONS = {"num_predict_steps", "use_bfloat16"}  # read by nobody; the network's dtype
DERIVED = {"max_len", "dtype"}  # the network's, from other fields of the recipe

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


@pytest.mark.parametrize("name", [*NAMES, *OTHERS, *V2_NAMES])
def test_recipes_have_the_fields_of_the_base(name):
    assert set(load(name)) == set(base.get_config())
    recipe.read(load(name))


@pytest.mark.parametrize(("chat", "base"), [("mukashi_chat", "mukashi"), ("japanese_0.1b_v2_chat", "japanese_0.1b_v2")])
def test_conversations_go_on_with_the_network_of_their_base(chat, base):
    chosen, before = recipe.read(load(chat)), recipe.read(load(base))
    assert chosen.data.conversations
    check_same_network(base, before.network, chosen.network)


@pytest.mark.parametrize(
    ("name", "parameters", "hours"), [("0.1b", 0.134e9, 1.4), ("0.4b", 0.37e9, 12), ("1.0b", 1.04e9, 4 * 24)]
)
def test_what_the_v2_recipes_say_of_themselves(name, parameters, hours):
    """20 tokens a parameter, steps of 2^19 tokens, and the time of an H100 at 41 % of 989 TFLOP/s."""
    chosen = recipe.read(load(f"japanese_{name}_v2"))
    found = count_params(chosen.network)
    assert found == pytest.approx(parameters, rel=0.02)
    assert chosen.train.global_batch_size * chosen.data.max_target_length == 2**19
    tokens = chosen.train.num_train_steps * 2**19
    assert tokens == pytest.approx(20 * found, rel=0.001)
    flops = tokens * flops_per_token(chosen.network, chosen.data.max_target_length)
    assert flops / (0.41 * 989e12) / 3600 == pytest.approx(hours, rel=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_beyond_the_original_is_on(name):
    chosen = recipe.read(load(name))
    data, network, optimizer = chosen.data, chosen.network, chosen.optimizer
    assert (data.unicode_normalization, data.cleaning_rules, data.streaming, data.preprocessor) == ("", "", False, None)
    assert not data.conversations
    assert (network.norm, network.positions, network.mlp, network.use_bias) == ("layer", "sinusoidal", "relu", True)
    assert not any((network.qk_norm, network.num_kv_heads, network.zero_init, network.logits_soft_cap))
    assert (optimizer.optimizer, optimizer.schedule) == ("adamw", "rsqrt")
    assert (optimizer.adam_b1, optimizer.adam_b2) == (0.9, 0.98)


def test_every_field_reaches_its_room():
    config = load("japanese_0.1b_v1")
    config.prompts = "一\n二"
    config.use_bfloat16 = False
    read = recipe.read(config)
    assert read.prompts == ("一", "二")
    assert read.network.dtype == "float32"
    assert read.network.max_len == 512
    assert (read.sampling.temperature, read.sampling.top_k, read.sampling.max_length) == (0.6, 20, 512)
    assert read.optimizer.learning_rate == 0.0016
    assert read.train.eval_every_steps == 5_000
    assert read.data.max_corpus_chars == 4e8


@pytest.mark.parametrize("content", ["", "[]", '{"recipe": 3}', '{"a":' * 10_000])
def test_broken_config_json(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json is not "):
        recipe.read_saved(epath.Path(tmp_path / "config.json"))


def test_none_as_a_command_line_writes_it():
    """In fields that are None at first, and in no others."""
    config = base.get_config()
    config.update(vocab_path="None", init_from="None", eval_dataset_name="None", prompts="None")
    chosen = recipe.read(config)
    assert (chosen.data.vocab_path, chosen.init_from, chosen.data.eval_dataset_name) == (None, None, None)
    assert chosen.prompts == ("None",)
    assert recipe.read_data(config) == chosen.data


def test_config_json_of_an_exported_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert recipe.read_saved(epath.Path(tmp_path / "config.json")) == {}


HEAD = "from transformer_lm.configs import base\ndef get_config():\n    config = base.get_config()\n"


def test_a_recipe_of_the_original_needs_no_new_fields(tmp_path):
    """Its files make a ConfigDict of their own; what they lack is as in the base recipe, which is the original's."""
    (tmp_path / "a.py").write_text(
        "import ml_collections\ndef get_config():\n    config = ml_collections.ConfigDict()\n"
        "    config.num_layers = 2\n    config.vocab_path = None\n    config.learning_rate = 0.5\n    return config\n"
    )
    config, expected = recipe.load(str(tmp_path / "a.py")), base.get_config()
    expected.update({"num_layers": 2, "learning_rate": 0.5})
    assert config.to_dict() == expected.to_dict()
    recipe.read(config)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            f"{HEAD}    config.num_layer = 1",
            r"a\.py, line 4: no recipe has the field 'num_layer'; did you mean 'num_layers'",
        ),
        (f"{HEAD}    config.xyzzy = 1", r"a\.py, line 4: no recipe has the field 'xyzzy'\."),
        (f"{HEAD}    config.num_layers = 'x'", r"a\.py, line 4: TypeError"),
        (
            f"{HEAD}    with config.unlocked(): config.emb_dims = 1\n    return config",
            r"a\.py.* did you mean 'emb_dim'",
        ),
        (f"{HEAD}    return dict(config)", r"a\.py.* returns dict"),
        (HEAD, r"a\.py.* returns NoneType"),
        ("x = 1", r"a\.py.*: it has no function get_config"),
        ("\ndef get_config(: pass", r"a\.py, line 2: SyntaxError"),
        ("import no_such_module", r"a\.py, line 1: ModuleNotFoundError"),
        ("def get_config():\n    return 1 / 0", r"a\.py, line 2: ZeroDivisionError"),
        ("import sys\nsys.exit(0)", r"a\.py, line 2: SystemExit"),
        ("get_config = 3", r"a\.py.*TypeError"),
        (
            "from ml_collections import ConfigDict\nfrom transformer_lm.configs import base\ndef get_config():\n"
            "    return ConfigDict(base.get_config().to_dict() | {'num_layers': 'x'})",
            r"a\.py.*num_layers='x' must be of the type int",
        ),
        ("\0", r"a\.py"),
    ],
)
def test_broken_recipe_files(tmp_path, text, words):
    (tmp_path / "a.py").write_text(text)
    with pytest.raises(UserError, match=words) as error:
        recipe.load(str(tmp_path / "a.py"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["no_such.py", ".", "no_such.py:argument"])
def test_no_recipe_file(tmp_path, name):
    with pytest.raises(UserError, match="no such file"):
        recipe.load(f"{tmp_path}/{name}")


def test_argument_of_a_recipe(tmp_path):
    path = tmp_path / "夏:目.py"
    path.write_text(f"{HEAD.replace('()', '(name=str())', 1)}    config.prompts = name\n    return config")
    assert recipe.load(f"{path}").prompts == ""
    path.rename(tmp_path / "b.py")
    assert recipe.load(f"{tmp_path}/b.py:a:b").prompts == "a:b"
    config = recipe.load(f"{tmp_path}/b.py")  # and a changed file is read anew, within the second
    (tmp_path / "b.py").write_text((tmp_path / "b.py").read_text().replace("= name", "= 'x'  "))
    assert (config.prompts, recipe.load(f"{tmp_path}/b.py").prompts) == ("", "x")


NUMBERS = [name for name, value in base.get_config().items() if type(value) in (int, float)]


@pytest.mark.parametrize("name", [name for name in NUMBERS if name not in EXCEPTIONS])
def test_impossible_numbers(name):
    """Every number there is has bounds, whatever is added."""
    kind = type(base.get_config()[name])
    for value in [-2, 10**30, True] if kind is int else [-2.0, 1e300, float("nan"), float("inf"), -float("inf"), "x"]:
        config = ConfigDict(base.get_config().to_dict() | {name: value})
        with pytest.raises(UserError, match=f"^{re.escape(f'{name}={value}')} must be|^{name}={value!r} must be"):
            recipe.read(config)


def test_an_evaluation_of_nothing():
    config = base.get_config()
    config.num_eval_steps = 0
    with pytest.raises(UserError, match="num_eval_steps=0 must be at least 1, or -1 for all"):
        recipe.read(config)


def test_every_field_has_one_owner():
    """Each field of base.py is that of one dataclass, and each dataclass's field one of base.py."""
    owners: dict[str, list] = {name: [] for name in base.get_config()}
    for owner in (DataConfig, TransformerConfig, OptimizerConfig, TrainConfig, SamplingConfig):
        names = recipe.SAMPLING_NAMES if owner is SamplingConfig else {}
        for field in dataclasses.fields(owner):
            name = names.get(field.name, field.name)
            if name not in DERIVED:
                owners[name].append(owner.__name__)
    for field in dataclasses.fields(Recipe):
        if field.name in owners and not dataclasses.is_dataclass(field.type):
            owners[field.name].append("Recipe")
    shared = {name: found for name, found in owners.items() if len(found) != 1 and name not in EXCEPTIONS}
    assert shared == {
        "vocab_size": ["DataConfig", "TransformerConfig"],  # wished for, and had
        "num_train_steps": ["OptimizerConfig", "TrainConfig"],  # which schedules follow
    }


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({"num_layers": "x"}, "config.json: num_layers='x' must be of the type int"),
        ({"prompts": ["a"]}, "config.json: prompts=.* must be of the type str"),
    ],
)
def test_edited_saved_recipes(saved, words):
    with pytest.raises(UserError, match=words):
        recipe.update(base.get_config(), saved, "config.json")


def test_saved_recipes_of_other_versions():
    config = base.get_config()
    recipe.update(config, {"num_layers": 3, "of_another_version": 1, "learning_rate": 1}, "config.json")
    assert (config.num_layers, config.learning_rate) == (3, 1.0)
