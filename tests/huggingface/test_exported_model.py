"""Exported folders: bit by bit what was exported, and no way in for a hostile one."""

import contextlib
import json
import os
import random
import struct

import jax
import numpy as np
import pytest
from conftest import memory_of_loading
from etils import epath
from test_tensor_tables import SHAPES, config_of, random_params

from transformer_lm import models
from transformer_lm.checkpoints import loading
from transformer_lm.errors import UserError
from transformer_lm.huggingface import exported_model
from transformer_lm.huggingface.architectures import table_of

safetensors = pytest.importorskip("safetensors")
safetensors_numpy = pytest.importorskip("safetensors.numpy")


def assert_same(found: models.Params, expected: models.Params):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == np.float32
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def exported(tmp_path):
    """A folder with a small model, its config and its parameters."""
    config = config_of("square")
    params = random_params(config)
    exported_model.save(tmp_path, config, params, 7)
    return epath.Path(tmp_path), config, params


def change_config(folder, change):
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


def change_tensors(folder, change):
    tensors = safetensors_numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors_numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip(tmp_path, shape):
    config = config_of(shape)
    params = random_params(config)
    exported_model.save(tmp_path, config, params, 7)
    found, loaded, step = exported_model.load(epath.Path(tmp_path))
    assert (found, step) == (config, 7)
    assert_same(loaded, params)


def test_several_files(tmp_path):
    config = config_of("square")
    params = random_params(config)
    exported_model.save(tmp_path, config, params, 7, max_shard=20_000)
    assert not (tmp_path / "model.safetensors").exists()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert index["metadata"]["total_size"] <= sum(sizes)
    _, loaded, _ = exported_model.load(epath.Path(tmp_path))
    assert_same(loaded, params)

    (tmp_path / files[1]).unlink()
    with pytest.raises(UserError, match=rf"{files[1]} is missing"):
        exported_model.load(epath.Path(tmp_path))


def test_nothing_but_json_and_safetensors(exported):
    folder, _, _ = exported
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_saved_again_by_others(exported):
    """Without our metadata the scales come back to the last bit or two, all else as it was."""
    folder, _, params = exported
    change_tensors(folder, lambda tensors: None)
    _, loaded, _ = exported_model.load(folder)
    found, expected = (jax.tree_util.tree_leaves_with_path(tree) for tree in (loaded, params))
    for (path, one), (_, other) in zip(found, expected, strict=True):
        if path[-1].key == "scale":
            np.testing.assert_allclose(one, other, rtol=3e-7)
        else:
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kept", ["", "!", "AAAA", "A" * 88])
def test_metadata_that_lie(exported, kept):
    """Scales kept beside a tensor count only where they are what was rounded."""
    folder, _, params = exported
    tensors = safetensors_numpy.load_file(folder / "model.safetensors")
    metadata = {f"transformer_lm:{name}": kept for name in tensors}
    safetensors_numpy.save_file(tensors, folder / "model.safetensors", metadata)
    _, loaded, _ = exported_model.load(folder)
    np.testing.assert_allclose(loaded["norm"]["scale"], params["norm"]["scale"], rtol=3e-7)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("transformer.wte.weight", (3, -1)),  # a ghost dimension
        ("transformer.wpe.weight", (3, 3)),
        ("transformer.h.1.attn.c_attn.bias", 3),
        ("transformer.h.1.attn.c_attn.weight", (0, -1)),  # a ghost head
        ("transformer.ln_f.bias", 16),  # the constant feature
        ("lm_head.weight", (0, -1)),
    ],
)
@pytest.mark.parametrize("value", [0.5, np.nan, np.inf])
def test_changed_since(exported, name, where, value):
    folder, _, _ = exported

    def change(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name][where] += value

    change_tensors(folder, change)
    with pytest.raises(UserError, match=rf"{name} is not one that export_huggingface.py writes"):
        exported_model.load(folder)


def foreign(content):
    content["architectures"] = ["LlamaForCausalLM"]


def stock_gpt2(content):
    del content["transformer_lm"]


def two_architectures(content):
    content["architectures"] = ["GPT2LMHeadModel", "GPT2Model"]


def remote_code(content):
    content["architectures"] = ["TransformerLMForCausalLM"]
    content["auto_map"] = {"AutoModelForCausalLM": "modeling.TransformerLMForCausalLM"}


def model_field(name, value):
    def change(content):
        content["transformer_lm"]["model"][name] = value

    change.__name__ = f"{name}={str(value)[:12]}"
    return change


def setting(name, value):
    def change(content):
        content[name] = value

    change.__name__ = f"{name}={value}"
    return change


def without(name):
    def change(content):
        del content[name]

    change.__name__ = f"without {name}"
    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (foreign, "LlamaForCausalLM that export_huggingface.py has not written"),
        (stock_gpt2, "GPT2LMHeadModel that export_huggingface.py has not written"),
        (two_architectures, "has not written"),
        (remote_code, "TransformerLMForCausalLM that export_huggingface.py has not written"),
        (setting("activation_function", "gelu_new"), "activation_function=gelu_new, but the network"),
        (setting("layer_norm_epsilon", 1e-5), "layer_norm_epsilon=1e-05, but the network"),
        (setting("scale_attn_weights", False), "scale_attn_weights=False, but the network"),
        (setting("scale_attn_by_inverse_layer_idx", True), "inverse_layer_idx=True, but the network"),
        (setting("add_cross_attention", True), "add_cross_attention=True, but the network"),
        (setting("quantization_config", {"bits": 4}), "quantization_config={'bits': 4}, which no export has"),
        (without("activation_function"), "activation_function is missing, but the network"),
        (setting("transformer_lm", 3), "has not written"),
        (setting("transformer_lm", {"model": [], "step": 1}), "does not describe a network"),
        (model_field("emb_dim", 10**15), "emb_dim=1000000000000000 must be at most"),
        (model_field("num_layers", 10**9), "n_layer=2, but the network"),
        (model_field("max_len", 2**20), "n_positions=2048, but the network"),
        (model_field("num_heads", True), "num_heads=True must be a whole number"),
        (model_field("emb_dim", 16.0), "emb_dim=16.0 must be a whole number"),
        (model_field("dropout_rate", float("nan")), "dropout_rate=nan must be finite"),
        (model_field("dtype", "__import__('os')"), "dtype"),
        (model_field("rope_theta", 10_000), "'rope_theta' is no field of the network"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_other_configs(exported, change, words):
    folder, _, _ = exported
    change_config(folder, change)
    with pytest.raises(UserError, match=words):
        exported_model.load(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (setting("rope_scaling", {"rope_type": "linear", "factor": 4.0}), "rope_scaling={.*}, but the network"),
        (setting("rope_parameters", {"rope_type": "yarn", "rope_theta": 10000.0}), "rope_parameters={.*}, but"),
        (without("rope_parameters"), "rope_parameters is missing"),
        (setting("rope_theta", 500.0), "rope_theta=500.0, but the network"),
        (setting("use_sliding_window", True), "use_sliding_window=True, but the network"),
        (setting("sliding_window", 4), "sliding_window=4, but the network"),
        (setting("layer_types", ["full_attention", "sliding_attention"]), "layer_types=.*, but the network"),
        (setting("attention_multiplier", 2.0), "attention_multiplier=2.0, which no export has"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_other_configs_of_today(tmp_path, change, words):
    """What transformers would compute something else by."""
    config = config_of("modern")
    exported_model.save(tmp_path, config, random_params(config), 7)
    change_config(tmp_path, change)
    with pytest.raises(UserError, match=rf"{words}.*changed since it was exported"):
        exported_model.load(epath.Path(tmp_path))


@pytest.mark.parametrize("shape", ["square", "modern"])
def test_configs_that_say_the_same(tmp_path, shape):
    """What transformers adds, or leaves out because it says it elsewhere."""
    config = config_of(shape)
    exported_model.save(tmp_path, config, random_params(config), 7)
    added = {
        "square": {
            "torch_dtype": "float32", "use_cache": False, "initializer_range": 0.1, "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False, "summary_type": "mean", "embd_pdrop": 0.5, "resid_pdrop": 0,
        },
        "modern": {
            "transformers_version": "9", "rope_scaling": None, "use_sliding_window": False, "sliding_window": None,
            "max_window_layers": 0, "layer_types": ["full_attention"] * 2, "attention_dropout": 0.5,
        },
    }  # fmt: skip
    change_config(tmp_path, lambda content: content.update(added[shape]) or content.pop("rope_theta", None))
    assert exported_model.load(epath.Path(tmp_path))[0] == config


def test_sizes_that_agree_with_each_other_but_not_with_the_file(exported):
    """config.json promises 2^31 layers, and later matrices of 2^62 bytes; the header of the file does not."""
    folder, config, _ = exported
    for field, words in [("num_layers", "tensors, the files 29"), ("mlp_dim", "must be F32")]:
        huge = models.TransformerConfig(**{**vars(config), field: 2**31 - 1})

        def change(content, huge=huge):
            content |= table_of(huge).settings
            content["transformer_lm"]["model"] = vars(huge)

        change_config(folder, change)
        with pytest.raises(UserError, match=words):
            exported_model.load(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a JSON file"),
        (b"\xff", "not a JSON file"),
        (b"[" * 1_000_000, "not a JSON file"),
        (b'{"a":' * 1_000_000, "not a JSON file"),
        (b"[]", "not a JSON object"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not a JSON file"),
        (b"{" + b" " * (64 << 20) + b"}", "at most 67108864 bytes"),
    ],
    ids=["empty", "bytes", "nested lists", "nested objects", "list", "long number", "long"],
)
def test_config_that_is_none(exported, content, words):
    folder, _, _ = exported
    (folder / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=words):
        exported_model.load(folder)


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 3, None, "model.bin", "x\0.safetensors"],
)
def test_names_in_an_index_stay_in_the_folder(exported, name):
    folder, _, _ = exported
    tensors = safetensors_numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    safetensors_numpy.save_file(tensors, folder.parent / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
    with pytest.raises(UserError, match="weight_map is not a map to"):
        exported_model.load(folder)


def header(content: dict | bytes, data: bytes = b"", size: int | None = None) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        header({}, size=2**63),
        header({}, size=10**9),
        header(b"[" * 100_000),
        header({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"\0" * 4),
        header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\0" * 4),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**60]}}, b"\0" * 4),
        header({"a": {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
        b"\x80\x04\x95" + b"cos\nsystem\n(S'true'\ntR.",
    ],
)
def test_files_that_are_no_safetensors(exported, content):
    folder, _, _ = exported
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="is damaged or not a safetensors file"):
        exported_model.load(folder)


def test_a_pipe_for_a_file(exported):
    """Which nobody writes to, and which a reader would wait for."""
    folder, _, _ = exported
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(UserError, match="is missing, or no file"):
        exported_model.load(folder)


def test_how_it_is_computed_is_not_the_folders_to_say(exported):
    """An edited one, or that of an earlier version, which kept it."""
    folder, config, _ = exported
    change_config(folder, model_field("attention", "cudnn"))
    assert exported_model.load(folder)[0].attention == config.attention


@pytest.mark.parametrize("kind", ["missing", "shape", "dtype", "extra"])
def test_other_tensors(exported, kind):
    folder, _, _ = exported

    def change(tensors):
        if kind == "missing":
            tensors["other"] = tensors.pop("lm_head.weight")
        elif kind == "shape":
            tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
        elif kind == "dtype":
            tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float16)
        else:
            tensors["other"] = np.zeros(3, np.float32)

    change_tensors(folder, change)
    words = {"missing": "lm_head.weight is missing", "extra": "has 29 tensors, the files 30"}
    with pytest.raises(UserError, match=words.get(kind, "lm_head.weight is F.* must be F32")):
        exported_model.load(folder)


def test_mutated_files(exported):
    """Whatever happens to the bytes: the same network, or one clear error."""
    folder, _, _ = exported
    rng = random.Random(0)
    for name, reach in [("config.json", 10_000), ("model.safetensors", 3_000)]:
        whole = (folder / name).read_bytes()
        for _ in range(700):
            content = bytearray(whole)
            for _ in range(rng.randint(1, 4)):
                place = rng.randrange(min(reach, len(content)))
                kind = rng.randrange(3)
                if kind == 0:
                    content[place] = rng.randrange(256)
                elif kind == 1:
                    del content[place : place + rng.randint(1, 20)]
                else:
                    content[place:place] = content[: rng.randint(1, 20)]
            (folder / name).write_bytes(bytes(content))
            with contextlib.suppress(UserError):
                exported_model.load(folder)
        (folder / name).write_bytes(whole)


def test_memory_at_the_published_width(tmp_path):
    """4 x 768 with 10,000 pieces: reading takes the parameters and at one time a tensor or two more."""
    config = models.TransformerConfig(10_000, emb_dim=768, num_heads=12, num_layers=4, qkv_dim=768, mlp_dim=3072)
    rng = np.random.default_rng(0)
    shapes = models.abstract_params(config)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)
    exported_model.save(tmp_path, config, params, 1)
    used, parameters = memory_of_loading(tmp_path)
    assert used < 2 * parameters
    _, loaded, _ = exported_model.load(epath.Path(tmp_path))
    assert_same(loaded, params)


def test_load_model_takes_the_folder(exported):
    folder, config, params = exported
    loaded = loading.load_model(folder)
    assert (loaded.config, loaded.step, loaded.tokenizer_path) == (config, 7, folder / "sentencepiece_model")
    assert_same(loaded.params, params)
