"""The network: parity with the original, and the properties that a language model rests on."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import batch_of, call, init
from flax import nnx

from transformer_lm import models
from transformer_lm.checkpoints import loading
from transformer_lm.errors import UserError


def unpacked(tokens):
    """A batch of one text a row, 0 being padding: [B, T] -> the network's inputs."""
    inputs = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return {"inputs": inputs, "positions": positions, "segments": (tokens > 0).astype(np.int32)}


MODERN = {
    "norm": "rms", "positions": "rope", "mlp": "swiglu", "qk_norm": True, "use_bias": False, "num_heads": 4,
    "num_kv_heads": 2,
}  # fmt: skip


@pytest.fixture(params=["the original", "modern"])
def either(request, tiny) -> models.TransformerConfig:
    """The original's kind of network, and today's."""
    return tiny if request.param == "the original" else dataclasses.replace(tiny, **MODERN)


class TestParityWithOriginal:
    def test_logits_and_losses(self, original):
        loaded = loading.load_model(original.path)
        tokens, real = original.reference["tokens"], original.reference["tokens"] > 0
        logits = np.asarray(call(loaded.config, loaded.params, unpacked(tokens)))
        np.testing.assert_allclose(
            logits[..., :: original.every][real], original.reference["logits"][real], atol=1e-4, rtol=0
        )
        losses = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), tokens[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(losses[real], original.reference["token_loss"][real], atol=1e-4, rtol=0)
        assert np.mean(losses[real]) == pytest.approx(original.about["mean_loss"], abs=1e-4)

    def test_packed_row(self, original):
        loaded = loading.load_model(original.path)
        tokens = original.reference["packed_tokens"]
        texts = [text.tolist() for text in np.split(tokens[0], np.flatnonzero(tokens[0] == 2)[:-1] + 1)]
        batch = batch_of([text[:-1] for text in texts], tokens.shape[1])
        np.testing.assert_array_equal(batch["segments"], original.reference["packed_segments"])
        np.testing.assert_array_equal(batch["positions"], original.reference["packed_positions"])
        logits = np.asarray(call(loaded.config, loaded.params, batch))[..., :: original.every]
        np.testing.assert_allclose(logits, original.reference["packed_logits"], atol=1e-4, rtol=0)

    def test_network_follows_from_the_arrays(self, original):
        config = loading.load_model(original.path).config
        for name in ("vocab_size", "emb_dim", "num_heads", "qkv_dim", "mlp_dim", "num_layers", "logits_via_embedding"):
            assert getattr(config, name) == original.about[name], name


class TestInit:
    def test_distributions(self):
        config = models.TransformerConfig(
            vocab_size=2000, emb_dim=64, num_heads=4, num_layers=3, qkv_dim=64, mlp_dim=256
        )
        params = init(config)
        assert np.std(params["embed"]["embedding"]) == pytest.approx(1.0, rel=0.02)
        # Xavier (Glorot and Bengio 2010): uniform within sqrt(6 / (fan in + fan out)).
        for kernel, fans in ((params["logits"]["kernel"], 2064), (params["blocks"]["mlp"]["wi"]["kernel"], 320)):
            assert np.max(np.abs(kernel)) == pytest.approx(np.sqrt(6 / fans), rel=0.01)
            assert np.std(kernel) == pytest.approx(np.sqrt(2 / fans), rel=0.02)
        assert np.std(params["blocks"]["mlp"]["wo"]["bias"]) == pytest.approx(1e-6, rel=0.2)
        assert np.all(params["norm"]["scale"] == 1)
        query = params["blocks"]["attention"]["query"]["kernel"]
        assert query.shape == (3, 64, 4, 16)
        assert not np.array_equal(query[0], query[1])

    def test_parameter_count(self):
        sizes = {"emb_dim": 768, "num_heads": 12, "num_layers": 12, "qkv_dim": 768, "mlp_dim": 3072}
        d, f, n, v = 768, 3072, 12, 30_000
        by_hand = v * d + n * (4 * d * d + 2 * d * f + f + d + 4 * d) + 2 * d + d * v + v
        assert models.count_params(models.TransformerConfig(vocab_size=v, **sizes)) == by_hand


class TestNetwork:
    def test_positions_follow_the_formula(self):
        table = models.sinusoidal_positions(50, 8)
        for position in (0, 1, 49):
            for i in range(4):
                angle = position * np.exp(-np.log(10000.0) / (8 / 2 - 1) * i)
                assert table[position, i] == pytest.approx(np.sin(angle), abs=1e-6)
                assert table[position, 4 + i] == pytest.approx(np.cos(angle), abs=1e-6)

    def test_no_gradient_from_later_tokens(self, either):
        """Causality: the logits at t do not depend on the embeddings of later inputs, and do on earlier ones."""
        params = init(either)
        inputs = np.arange(1, 9)[None]  # each id once, so that an embedding row stands for a position
        batch = unpacked(np.append(inputs[:, 1:], [[9]], axis=1))

        @jax.jit
        @jax.grad
        def gradient_of(embedding, t):
            return jnp.sum(call(either, params | {"embed": {"embedding": embedding}}, batch)[0, t] ** 2)

        for t in range(8):
            gradient = np.asarray(gradient_of(params["embed"]["embedding"], t))
            norms = np.linalg.norm(gradient[batch["inputs"][0]], axis=-1)  # [T]
            assert np.all(norms[: t + 1] > 0)
            assert np.all(norms[t + 1 :] == 0)

    def test_packed_equals_separate(self, either):
        params = init(either)
        texts = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14, 15, 16, 17]]
        packed = np.asarray(call(either, params, batch_of(texts, 20)))[0]
        start = 0
        for text in texts:
            alone = np.asarray(call(either, params, batch_of([text], 20)))[0, : len(text) + 1]
            np.testing.assert_allclose(packed[start : start + len(alone)], alone, atol=1e-5)
            start += len(alone)

    @pytest.mark.parametrize("arrange", [lambda params: params, models.for_decoding], ids=["", "for decoding"])
    @pytest.mark.parametrize("changes", [{}, {"logits_via_embedding": True}, MODERN], ids=["", "tied", "modern"])
    def test_cached_equals_uncached(self, tiny, changes, arrange):
        """A prompt in one pass, then token by token, with a shorter prompt padded on the left beside it."""
        config = dataclasses.replace(tiny, **changes)
        params = init(config)
        texts = np.array([[0, 3, 4, 5, 6, 7, 8, 9], [0, 13, 14, 15, 16, 17, 18, 19]])
        positions = np.broadcast_to(np.arange(8), texts.shape)
        expected = call(config, params, {"inputs": texts, "positions": positions, "segments": np.ones_like(texts)})
        extend = jax.jit(lambda params, *arguments: models.bind(config, params).extend(*arguments))
        params = arrange(params)
        prompts = np.array([[0, 3, 4, 5], [0, 0, 0, 13]])  # lengths 4 and 2
        starts = np.array([[0], [2]])
        positions, valid = np.maximum(np.arange(4) - starts, 0), np.arange(4) >= starts
        logits, cache = extend(params, prompts, positions, valid, models.empty_cache(config, 2, 12))
        np.testing.assert_allclose(logits, [expected[0, 3], expected[1, 1]], atol=1e-5)
        for step in range(4):
            at = np.array([4, 2]) + step
            tokens = texts[np.arange(2), at][:, None]
            logits, cache = extend(params, tokens, at[:, None], np.ones((2, 1), bool), cache)
            np.testing.assert_allclose(logits, [expected[0, 4 + step], expected[1, 2 + step]], atol=1e-5)

    @pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA for CPUs")
    @pytest.mark.parametrize("rows", [1, 3])
    def test_a_decoding_step_moves_no_weights(self, tiny, rows):
        config = dataclasses.replace(tiny, emb_dim=24, vocab_size=51)  # sizes that nothing else has
        params = models.for_decoding(init(config))
        arguments = np.ones((rows, 1), int), np.ones((rows, 1), int), np.ones((rows, 1), bool)
        step = jax.jit(lambda params, cache: models.bind(config, params).extend(*arguments, cache))
        text = step.lower(params, models.empty_cache(config, rows, 12)).compile().as_text()
        weights = {24 * 16, 24 * 32, 24 * 51}
        made = re.findall(r"= f32\[([\d,]+)\]\S* (?:copy|transpose|fusion)\(", text)
        assert not [shape for shape in made if math.prod(map(int, shape.split(","))) in weights]

    def test_logits_via_embedding(self, tiny):
        """The formula, on what the untied network with the transposed embedding as kernel computes."""
        config = dataclasses.replace(tiny, logits_via_embedding=True)
        params = init(config)
        assert "logits" not in params
        batch = batch_of([[3, 4, 5]], 20)
        kernel = params["embed"]["embedding"].T / np.sqrt(tiny.emb_dim)
        untied = params | {"logits": {"kernel": kernel, "bias": np.zeros(tiny.vocab_size, np.float32)}}
        np.testing.assert_allclose(call(config, params, batch), call(tiny, untied, batch), atol=1e-5)

    def test_bfloat16_computes_near_float32_and_returns_float32(self, either):
        params = init(either)
        batch = batch_of([[3, 4, 5, 6]], 20)
        exact = call(either, params, batch)
        rough = call(dataclasses.replace(either, dtype="bfloat16"), params, batch)
        assert rough.dtype == jnp.float32
        assert 0 < np.max(np.abs(rough - exact)) < 0.1

    @pytest.mark.parametrize("kind", ["layer", "rms"])
    def test_scales_are_not_rounded(self, tiny, kind):
        """To bfloat16, in which there is nothing between 1 and 1.008."""
        config = dataclasses.replace(tiny, dtype="bfloat16")
        norm = models.make_norm(kind, 64, config, nnx.Rngs(0))
        norm.scale[...] = jnp.full(64, 1.003)
        x = np.random.default_rng(0).normal(size=(4096, 64)).astype(np.float32)
        centred = x - x.mean(axis=-1, keepdims=True) * (kind == "layer")
        expected = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + models.NORM_EPSILON)
        found = norm(jnp.asarray(x))
        assert found.dtype == jnp.bfloat16
        gain = (np.asarray(found, np.float64) * expected).sum() / (expected**2).sum()
        assert gain == pytest.approx(1.003, abs=3e-4)

    def test_the_bias_of_logits_is_not_rounded(self, tiny):
        config = dataclasses.replace(tiny, dtype="bfloat16", zero_init=True)
        params = init(config)
        bias = np.linspace(-14, -4, tiny.vocab_size, dtype=np.float32)
        params = params | {"logits": params["logits"] | {"bias": bias}}
        found = call(config, params, batch_of([[3, 4]], 4))
        np.testing.assert_allclose(found[0, 0], bias, atol=1e-6)

    def test_layers_run_under_scan(self, tiny):
        """One layer is traced, however many there are."""
        sizes = []
        for layers in (2, 12):
            config = dataclasses.replace(tiny, num_layers=layers)
            params = models.abstract_params(config)
            sizes.append(len(str(jax.make_jaxpr(lambda p, c=config: call(c, p, batch_of([[3]], 4)))(params))))
        assert sizes[1] < 1.05 * sizes[0]

    def test_dropout_only_with_keys(self, tiny):
        params = init(tiny)
        batch = batch_of([[3, 4, 5]], 6)
        quiet = call(tiny, params, batch_of([[3, 4, 5]], 20))[:, :6]
        noisy = [call(tiny, params, batch, jax.random.split(jax.random.key(seed), 1)) for seed in (1, 1, 2)]
        np.testing.assert_array_equal(noisy[0], noisy[1])
        assert not np.allclose(noisy[0], noisy[2])
        assert not np.allclose(noisy[0], quiet)

    def test_a_row_does_not_depend_on_its_neighbours(self, either):
        """Nor do its dropout masks: a batch may be computed in parts."""
        params, keys = init(either), jax.random.split(jax.random.key(1), 2)
        rows = [batch_of([[3, 4, 5]], 6), batch_of([[7, 8], [9]], 6)]
        both = call(either, params, jax.tree.map(lambda *parts: np.concatenate(parts), *rows), keys)
        for i, row in enumerate(rows):
            np.testing.assert_allclose(call(either, params, row, keys[i : i + 1])[0], both[i], atol=1e-6)

    def test_remat_changes_nothing_but_memory(self, either):
        batch, keys = batch_of([[3, 4, 5], [6, 7]], 8), jax.random.split(jax.random.key(1), 1)

        def gradient(config):
            return jax.jit(jax.grad(lambda params: jnp.sum(call(config, params, batch, keys) ** 2)))(init(either))

        plain, again = gradient(either), gradient(dataclasses.replace(either, remat="block"))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), plain, again)


class TestModernNetwork:
    """What is not seen from a Qwen3's tensors, of which tests/huggingface has the formula."""

    def test_logits_depend_on_distances_alone(self, tiny):
        """Rotary positions: a text that stands later in a context is the same text."""
        config = dataclasses.replace(tiny, **MODERN)
        params, batch = init(config), batch_of([[3, 4, 5, 6, 7]], 20)
        later = batch | {"positions": batch["positions"] + 1000}
        np.testing.assert_allclose(call(config, params, batch), call(config, params, later), atol=2e-4)
        swapped = batch | {"inputs": batch["inputs"][:, [0, 2, 1, *range(3, 20)]]}
        assert not np.allclose(call(config, params, batch)[0, 5], call(config, params, swapped)[0, 5], atol=1e-3)

    def test_grouped_heads_are_shared(self, tiny):
        """Two heads that read the same keys and values: what a network with a copy of these for each computes."""
        grouped = dataclasses.replace(tiny, num_heads=4, num_kv_heads=2)
        params, batch = init(grouped), batch_of([[3, 4, 5, 6]], 6)
        attention = params["blocks"]["attention"]
        copied = {
            name: {
                "kernel": np.repeat(attention[name]["kernel"], 2, axis=2)
                if name in ("key", "value")
                else part["kernel"]
            }
            for name, part in attention.items()
        }
        whole = params | {"blocks": params["blocks"] | {"attention": copied}}
        expected = call(dataclasses.replace(tiny, num_heads=4), whole, batch)
        np.testing.assert_allclose(call(grouped, params, batch), expected, atol=1e-5)
        assert models.empty_cache(grouped, 3, 8).keys[0].shape == (3, 2, 8, 4)

    def test_zero_init(self, tiny):
        """Every token is as likely, and only the logits' kernel has a gradient to begin with."""
        config = dataclasses.replace(tiny, **MODERN, zero_init=True)
        params, batch = init(config), batch_of([[3, 4, 5, 6]], 6)
        assert np.all(call(config, params, batch) == 0)
        gradients = jax.jit(jax.grad(lambda params: call(config, params, batch)[0, 2, 7]))(params)
        alive = {path for path, leaf in jax.tree_util.tree_leaves_with_path(gradients) if np.any(leaf)}
        assert {jax.tree_util.keystr(path) for path in alive} == {"['logits']['kernel']"}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"num_heads": 3}, "qkv_dim=16 does not divide by num_heads=3"),
        ({"emb_dim": 15}, "emb_dim=15 must be even"),
        ({"dropout_rate": 1.0}, "dropout_rate=1.0 must be below 1"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"norm": "batch"}, "norm='batch' must be one of layer, rms"),
        ({"mlp": "gelu"}, "mlp='gelu' must be one of relu, relu_squared, swiglu"),
        ({"num_kv_heads": 3}, "num_heads=2 does not divide by num_kv_heads=3"),
        ({"positions": "rope", "qkv_dim": 6}, "head size=3 must be even"),
        ({"remat": "all"}, "remat='all' must be one of none, block"),
        ({"attention": "flash"}, "attention='flash' must be one of auto, xla, cudnn, triton, tpu"),
    ],
)
def test_impossible_networks(tiny, wrong, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(tiny, **wrong)
