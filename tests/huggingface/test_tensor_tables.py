"""The tables: GPT-2 as its paper and its code define it, in NumPy, computes our network from them."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from transformer_lm import models
from transformer_lm.huggingface import exported_model, tensor_tables

SHAPES = {
    "square": {"emb_dim": 16, "num_heads": 2, "num_layers": 2, "qkv_dim": 16, "mlp_dim": 32},
    "wide attention": {"emb_dim": 16, "num_heads": 2, "num_layers": 1, "qkv_dim": 48, "mlp_dim": 24},
    "narrow attention": {"emb_dim": 24, "num_heads": 3, "num_layers": 1, "qkv_dim": 12, "mlp_dim": 8},
    "one head": {"emb_dim": 32, "num_heads": 1, "num_layers": 3, "qkv_dim": 32, "mlp_dim": 16},
    "via embedding": {"emb_dim": 16, "num_heads": 4, "num_layers": 2, "qkv_dim": 16, "mlp_dim": 32,
                      "logits_via_embedding": True},
    "long": {"emb_dim": 8, "num_heads": 2, "num_layers": 1, "qkv_dim": 8, "mlp_dim": 8, "max_len": 3000},
}  # fmt: skip


def config_of(shape: str) -> models.TransformerConfig:
    return models.TransformerConfig(vocab_size=50, **{"max_len": 32} | SHAPES[shape])


def random_params(config: models.TransformerConfig, seed: int = 0) -> models.Params:
    """No bias is zero and no scale one, so that none can be forgotten."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(np.asarray, jax.jit(models.init, static_argnums=0)(config, jax.random.key(seed)))
    return jax.tree.map(lambda x: (x + 0.3 * rng.standard_normal(x.shape)).astype(np.float32), params)


def theirs(config: models.TransformerConfig, params: models.Params) -> dict[str, np.ndarray]:
    """All tensors by name."""
    sizes = tensor_tables.Sizes(config)
    flat = traverse_util.flatten_dict(params, sep=".")
    return {
        name: row.export(sizes, *exported_model.parameters(flat, row, i))
        for name, row, i in exported_model.layered(config)
    }


def gpt2(settings: dict, w: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Logits [T, V] float64 of ids [T] (Radford et al. 2019; with ReLU, as settings say)."""
    assert settings["activation_function"] == "relu"
    w = {name: value.astype(np.float64) for name, value in w.items()}

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred**2).mean(-1, keepdims=True)
        scaled = centred / np.sqrt(variance + settings["layer_norm_epsilon"])
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def dense(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    heads, size = settings["n_head"], settings["n_embd"] // settings["n_head"]
    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][: len(ids)]
    for i in range(settings["n_layer"]):
        block = f"transformer.h.{i}"
        query, key, value = (
            part.reshape(-1, heads, size).swapaxes(0, 1)
            for part in np.split(dense(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn"), 3, axis=-1)
        )  # [H, T, K]
        scores = query @ key.swapaxes(1, 2) / np.sqrt(size)
        scores = np.where(np.tri(len(ids), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + dense((weights @ value).swapaxes(0, 1).reshape(len(ids), -1), f"{block}.attn.c_proj")
        hidden = np.maximum(dense(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"), 0)
        x = x + dense(hidden, f"{block}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


def ours(config: models.TransformerConfig, params: models.Params, ids: np.ndarray) -> np.ndarray:
    """Logits [T, V] of ids [T]."""
    positions = np.arange(len(ids))[None]
    return np.asarray(models.bind(config, params)(ids[None], positions, np.ones_like(positions)))[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_gpt2_computes_our_network(shape):
    config = config_of(shape)
    params = random_params(config)
    ids = np.append(0, np.random.default_rng(1).integers(3, 50, 29))
    expected = ours(config, params, ids)
    found = gpt2(tensor_tables.settings(config), theirs(config, params), ids)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_as_the_table_says(shape):
    config = config_of(shape)
    sizes = tensor_tables.Sizes(config)
    found = theirs(config, random_params(config))
    for name, row, _ in exported_model.layered(config):
        assert (found[name].shape, found[name].dtype) == (row.shape(sizes), np.float32), name


def test_every_parameter_has_a_place():
    """Each of ours is restored from exactly one of theirs."""
    for shape in SHAPES:
        config = config_of(shape)
        restored = [name for row in tensor_tables.tensors(config) if row.restore for name in row.ours]
        leaves = jax.tree_util.tree_leaves_with_path(models.abstract_params(config))
        assert sorted(restored) == sorted(".".join(key.key for key in path) for path, _ in leaves)


def test_width_of_the_published_model():
    config = models.TransformerConfig(30_000, emb_dim=768, num_heads=12, num_layers=12, qkv_dim=768, mlp_dim=3072)
    sizes = tensor_tables.Sizes(config)
    assert (sizes.width, sizes.all_heads) == (832, 13)


def test_sizes_never_leave_the_ghosts_out():
    for emb, heads, qkv in [(16, 2, 16), (18, 4, 16), (16, 1, 64), (64, 8, 8), (30, 5, 30)]:
        config = models.TransformerConfig(50, emb_dim=emb, num_heads=heads, qkv_dim=qkv)
        sizes = tensor_tables.Sizes(config)
        assert sizes.width > emb
        assert sizes.width == sizes.all_heads * sizes.head
        assert sizes.all_heads >= heads
