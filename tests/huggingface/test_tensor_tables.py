"""The tables: GPT-2 and Qwen3 as their papers and code define them, in NumPy, compute our networks from them."""

import jax
import numpy as np
import pytest
from conftest import call
from flax import traverse_util

from transformer_lm import models
from transformer_lm.errors import UserError
from transformer_lm.huggingface import exported_model
from transformer_lm.huggingface.architectures import table_of

MODERN = {"norm": "rms", "positions": "rope", "mlp": "swiglu", "qk_norm": True, "use_bias": False}
SHAPES = {
    "square": {"emb_dim": 16, "num_heads": 2, "num_layers": 2, "qkv_dim": 16, "mlp_dim": 32},
    "wide attention": {"emb_dim": 16, "num_heads": 2, "num_layers": 1, "qkv_dim": 48, "mlp_dim": 24},
    "narrow attention": {"emb_dim": 24, "num_heads": 3, "num_layers": 1, "qkv_dim": 12, "mlp_dim": 8},
    "one head": {"emb_dim": 32, "num_heads": 1, "num_layers": 3, "qkv_dim": 32, "mlp_dim": 16},
    "via embedding": {"emb_dim": 16, "num_heads": 4, "num_layers": 2, "qkv_dim": 16, "mlp_dim": 32,
                      "logits_via_embedding": True},
    "modern": {"emb_dim": 16, "num_heads": 2, "num_layers": 2, "qkv_dim": 16, "mlp_dim": 24, **MODERN},
    "modern, grouped, wide": {"emb_dim": 16, "num_heads": 4, "num_kv_heads": 2, "num_layers": 1, "qkv_dim": 32,
                              "mlp_dim": 40, "rope_base": 500.0, **MODERN},
    "modern, via embedding": {"emb_dim": 24, "num_heads": 2, "num_layers": 1, "qkv_dim": 16, "mlp_dim": 24,
                              "logits_via_embedding": True, **MODERN},
    "long": {"emb_dim": 8, "num_heads": 2, "num_layers": 1, "qkv_dim": 8, "mlp_dim": 8, "max_len": 3000},
}  # fmt: skip


def config_of(shape: str) -> models.TransformerConfig:
    return models.TransformerConfig(vocab_size=50, **{"max_len": 32} | SHAPES[shape])


def random_params(config: models.TransformerConfig, seed: int = 0) -> models.Params:
    """No bias is zero and no scale one, so that none can be forgotten."""
    rng = np.random.default_rng(seed)

    def random(path, x):
        return (float(path[-1].key == "scale") + 0.3 * rng.standard_normal(x.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(random, models.abstract_params(config))


def theirs(config: models.TransformerConfig, params: models.Params) -> dict[str, np.ndarray]:
    """All tensors by name."""
    table = table_of(config)
    flat = traverse_util.flatten_dict(params, sep=".")
    return {
        name: row.export(table.sizes, *exported_model.parameters(flat, row, i))
        for name, row, i in exported_model.layered(table)
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


def qwen3(settings: dict, w: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Logits [T, V] float64 of ids [T] (Qwen team 2025; Su et al. 2021 for rotary positions)."""
    assert settings["hidden_act"] == "silu"
    w = {name: value.astype(np.float64) for name, value in w.items()}
    size, groups = settings["head_dim"], settings["num_attention_heads"] // settings["num_key_value_heads"]

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + settings["rms_norm_eps"]) * w[f"{name}.weight"]

    def dense(x, name):
        return x @ w[f"{name}.weight"].T

    def turn(x):
        """As complex numbers: position t turns pair i by t / base^(2 i / K)."""
        frequencies = settings["rope_theta"] ** (-np.arange(0, size, 2) / size)
        pairs = x[..., : size // 2] + 1j * x[..., size // 2 :]
        pairs = pairs * np.exp(1j * np.arange(x.shape[1])[:, None] * frequencies)
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    def heads(x):
        return x.reshape(len(ids), -1, size).swapaxes(0, 1)  # [H, T, K]

    x = w["model.embed_tokens.weight"][ids]
    for i in range(settings["num_hidden_layers"]):
        block = f"model.layers.{i}"
        attention = f"{block}.self_attn"
        read = norm(x, f"{block}.input_layernorm")
        query = turn(norm(heads(dense(read, f"{attention}.q_proj")), f"{attention}.q_norm"))
        key = turn(norm(heads(dense(read, f"{attention}.k_proj")), f"{attention}.k_norm"))
        value = heads(dense(read, f"{attention}.v_proj"))
        written = []
        for head in range(settings["num_attention_heads"]):
            scores = query[head] @ key[head // groups].T / np.sqrt(size)
            weights = np.exp(scores) * np.tri(len(ids))
            written.append(weights / weights.sum(-1, keepdims=True) @ value[head // groups])
        x = x + dense(np.concatenate(written, axis=-1), f"{attention}.o_proj")
        read = norm(x, f"{block}.post_attention_layernorm")
        gate = dense(read, f"{block}.mlp.gate_proj")
        x = x + dense(gate / (1 + np.exp(-gate)) * dense(read, f"{block}.mlp.up_proj"), f"{block}.mlp.down_proj")
    return norm(x, "model.norm") @ w["lm_head.weight"].T


def ours(config: models.TransformerConfig, params: models.Params, ids: np.ndarray) -> np.ndarray:
    """Logits [T, V] of ids [T]."""
    positions = np.arange(len(ids))[None]
    return np.asarray(
        call(config, params, {"inputs": ids[None], "positions": positions, "segments": positions * 0 + 1})
    )[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_theirs_computes_our_network(shape):
    config = config_of(shape)
    params = random_params(config)
    ids = np.append(0, np.random.default_rng(1).integers(3, 50, 29))
    expected = ours(config, params, ids)
    table = table_of(config)
    compute = {"GPT2LMHeadModel": gpt2, "Qwen3ForCausalLM": qwen3}[table.architecture]
    found = compute(table.settings, theirs(config, params), ids)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_as_the_table_says(shape):
    config = config_of(shape)
    table = table_of(config)
    found = theirs(config, random_params(config))
    for name, row, _ in exported_model.layered(table):
        assert (found[name].shape, found[name].dtype) == (row.shape(table.sizes), np.float32), name


def test_every_parameter_has_a_place():
    """Each of ours is restored from exactly one of theirs."""
    for shape in SHAPES:
        config = config_of(shape)
        restored = [name for row in table_of(config).tensors if row.restore for name in row.ours]
        leaves = jax.tree_util.tree_leaves_with_path(models.abstract_params(config))
        assert sorted(restored) == sorted(".".join(key.key for key in path) for path, _ in leaves)


def test_width_of_the_published_model():
    config = models.TransformerConfig(30_000, emb_dim=768, num_heads=12, num_layers=12, qkv_dim=768, mlp_dim=3072)
    sizes = table_of(config).sizes
    assert (sizes.width, sizes.all_heads) == (832, 13)


def test_sizes_never_leave_the_ghosts_out():
    for emb, heads, qkv in [(16, 2, 16), (18, 4, 16), (16, 1, 64), (64, 8, 8), (30, 5, 30)]:
        config = models.TransformerConfig(50, emb_dim=emb, num_heads=heads, qkv_dim=qkv)
        sizes = table_of(config).sizes
        assert sizes.width > emb
        assert sizes.width == sizes.all_heads * sizes.head
        assert sizes.all_heads >= heads


@pytest.mark.parametrize(
    "fields",
    [
        {"positions": "rope"},
        MODERN | {"logits_soft_cap": 15.0},
        MODERN | {"qk_norm": False},
    ],
)
def test_a_network_that_nobody_else_computes(fields):
    with pytest.raises(UserError, match="No architecture of transformers computes a network with norm="):
        table_of(models.TransformerConfig(50, **fields))
