"""Attention in blocks and by fused kernels, against attention written out in NumPy."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from transformer_lm import attention, axes
from transformer_lm.errors import UserError


def device(platform: str, kind: str, **more) -> types.SimpleNamespace:
    return types.SimpleNamespace(platform=platform, device_kind=kind, **more)


CPU, H100 = device("cpu", "cpu"), device("gpu", "NVIDIA H100 80GB HBM3", compute_capability="9.0")
TPU = device("tpu", "TPU v4")


def inputs(length: int, heads: int = 2, size: int = 8):
    """query, key, value [1, H, T, K], and segments [1, T] of three texts and padding."""
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(3, 1, heads, length, size)).astype(np.float32)
    segments = np.sort(rng.integers(1, 4, (1, length))).astype(np.int32)
    segments[:, -length // 8 :] = 0
    return *arrays, segments


def by_hand(query, key, value, segments):
    """Softmax attention, written out in float64."""
    query, key, value = (x.astype(np.float64) for x in (query, key, value))
    scores = np.einsum("bhtk,bhsk->bhts", query, key)
    seen = (segments[:, :, None] == segments[:, None, :]) & np.tri(query.shape[2], dtype=bool)
    weights = np.where(seen[:, None], np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
    return np.einsum("bhts,bhsk->bhtk", weights / weights.sum(axis=-1, keepdims=True), value)


@pytest.fixture
def short_blocks(monkeypatch):
    monkeypatch.setattr(attention, "LONG", 16)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 16)


def test_written_out():
    arrays = inputs(48)
    np.testing.assert_allclose(attention.attend_in_rows(*arrays), by_hand(*arrays), atol=1e-5)


def test_in_blocks(short_blocks):
    """Values and gradients are those of the whole."""
    *arrays, segments = inputs(48)
    np.testing.assert_allclose(attention.attend_in_rows(*arrays, segments), by_hand(*arrays, segments), atol=1e-5)

    def gradients():
        def loss(query, key, value):
            return jnp.sum(attention.attend_in_rows(query, key, value, segments) ** 2)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)

    in_blocks = gradients()
    attention.LONG = 1024
    whole = gradients()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), in_blocks, whole)


def test_in_blocks_the_scores_never_lie_together(short_blocks):
    """Forward and backward, with dropout: the compiled step holds far less than the scores [B, H, T, T]."""
    *arrays, segments = inputs(512)
    keys = jax.random.split(jax.random.key(0), 1)

    def loss(query, key, value):
        attend = functools.partial(attention.attend_in_rows, dropout_rate=0.1, dropout_keys=keys)
        return jnp.sum(attend(query, key, value, segments) ** 2)

    memory = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays).compile().memory_analysis().temp_size_in_bytes
    assert memory < 2 * 512 * 512 * 4 / 2


def test_dropout_in_blocks(short_blocks):
    """A third of what is summed up falls out, other tokens for other rows and queries; the rest is scaled."""
    query, key, _, segments = inputs(64)
    ones = np.ones_like(key)
    keys = jax.random.split(jax.random.key(0), 1)
    attended = attention.attend_in_rows(query, key, ones, segments, dropout_rate=1 / 3, dropout_keys=keys)
    assert np.mean(attended) == pytest.approx(1, abs=0.1)
    assert len(np.unique(np.round(attended[..., 0], 5))) > 64


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="JAX's interpreter of TPU kernels runs on CPU and TPU")
@pytest.mark.parametrize(("length", "size"), [(384, 64), (128, 128)])
def test_the_tpus_kernel(length, size):
    """Run by JAX's interpreter of TPU kernels, where there is no TPU; keys are shared by two heads each."""
    pltpu = pytest.importorskip("jax.experimental.pallas.tpu")
    query, _, _, segments = inputs(length, heads=4, size=size)
    _, key, value, _ = inputs(length, heads=2, size=size)
    query, real = query / 3, segments[0] > 0

    def gradients(kind):
        def loss(*arrays):
            return jnp.sum(attention.attend_in_rows(*arrays, segments, kind=kind)[:, :, real] ** 2)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(query, key, value)

    with pltpu.force_tpu_interpret_mode():
        attended = attention.attend_in_rows(query, key, value, segments, kind="tpu")
        found = gradients("tpu")
    expected = by_hand(query, *(x.repeat(2, axis=1) for x in (key, value)), segments)
    np.testing.assert_allclose(attended[:, :, real], expected[:, :, real], atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), found, gradients("xla"))


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_the_kernels_for_gpus(monkeypatch, rate):
    """Run by JAX's interpreter: values and gradients are those of attention written out, and so is what drops out."""
    from transformer_lm import flash_attention

    monkeypatch.setattr(flash_attention, "INTERPRET", True)
    monkeypatch.setattr(flash_attention, "BLOCK", 32)
    query, _, _, segments = (np.concatenate([x, x[:, ..., ::-1]]) for x in inputs(96, heads=4))
    _, key, value, _ = (np.concatenate([x, x]) for x in inputs(96, heads=2))
    segments[1] = 3
    keys = jax.random.split(jax.random.key(0), 2)

    def attend(kind, *arrays):
        return attention.attend_in_rows(*arrays, segments, kind=kind, dropout_rate=rate, dropout_keys=keys)

    def gradients(kind):
        gradient = jax.grad(lambda *arrays: jnp.sum(attend(kind, *arrays) ** 2), (0, 1, 2))
        return jax.jit(gradient)(query, key, value)

    attended = attend("triton", query, key, value)
    np.testing.assert_allclose(attended, attend("xla", query, key, value), atol=1e-5)
    if not rate:
        np.testing.assert_allclose(
            attended, by_hand(query, *(x.repeat(2, axis=1) for x in (key, value)), segments), atol=1e-5
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradients("triton"), gradients("xla"))


@pytest.mark.parametrize("size", [32, 64, 128])
def test_the_kernels_are_translated_for_gpus(monkeypatch, size):
    """Forward, and backward for keys and values and for queries: what Triton could not take would be refused here."""
    monkeypatch.setattr(axes, "device", lambda: H100)
    query, key = (jax.ShapeDtypeStruct((2, heads, 192, size), jnp.bfloat16) for heads in (4, 2))
    segments = jax.ShapeDtypeStruct((2, 192), jnp.int32)
    keys = jax.random.split(jax.random.key(0), 2)

    def loss(query, key, value, segments):
        options = {"kind": "triton", "dropout_rate": 0.1, "dropout_keys": keys}
        return attention.attend_in_rows(query, key, value, segments, **options).astype(jnp.float32).sum()

    device = AbstractDevice("NVIDIA H100 80GB HBM3", None, "cuda")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        step = jax.jit(jax.grad(loss, (0, 1, 2))).trace(query, key, key, segments)
        text = step.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 3


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="Triton compiles for GPUs only")
@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_the_kernels_on_a_gpu(rate):
    *arrays, segments = inputs(256, size=64)
    arrays = [jnp.asarray(x / 3, jnp.bfloat16) for x in arrays]
    keys = jax.random.split(jax.random.key(0), 1)

    def results(kind):
        def attend(*arrays):
            return attention.attend_in_rows(*arrays, segments, kind=kind, dropout_rate=rate, dropout_keys=keys)

        attended, gradients = jax.vjp(attend, *arrays)
        return [np.asarray(x, np.float32) for x in (attended, *gradients(arrays[0]))]

    for found, expected in zip(results("triton"), results("xla"), strict=True):
        assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN's kernel runs on NVIDIA GPUs only")
def test_cudnns_kernel():
    *arrays, segments = inputs(256, size=64)
    arrays = [jnp.asarray(x / 3, jnp.bfloat16) for x in arrays]
    attended = attention.attend_in_rows(*arrays, segments, kind="cudnn")
    np.testing.assert_allclose(attended, by_hand(*map(np.asarray, arrays), segments), atol=3e-2)


@pytest.mark.parametrize(
    ("device", "dtype", "rate", "length", "size", "chosen"),
    [
        (CPU, jnp.bfloat16, 0.0, 256, 64, "xla"),
        (H100, jnp.bfloat16, 0.0, 256, 64, "triton"),
        (H100, jnp.bfloat16, 0.1, 256, 64, "triton"),
        (H100, jnp.float32, 0.0, 256, 64, "xla"),
        (H100, jnp.bfloat16, 0.0, 256, 96, "cudnn"),  # heads, and rows, that this project's kernels are not made for
        (H100, jnp.bfloat16, 0.0, 256, 128, "cudnn"),
        (H100, jnp.bfloat16, 0.1, 256, 128, "triton"),
        (H100, jnp.bfloat16, 0.0, 200, 64, "cudnn"),
        (H100, jnp.bfloat16, 0.1, 200, 64, "xla"),
        (H100, jnp.bfloat16, 0.0, 255, 64, "xla"),  # an odd row, whose gradient it does not have
        (H100, jnp.bfloat16, 0.0, 256, 192, "xla"),
        (device("gpu", "NVIDIA A100-SXM4-40GB", compute_capability="8.0"), jnp.bfloat16, 0.0, 256, 64, "triton"),
        (device("gpu", "Tesla T4", compute_capability="7.5"), jnp.bfloat16, 0.0, 256, 64, "xla"),
        (device("gpu", "AMD Instinct MI300X", compute_capability="gfx942"), jnp.bfloat16, 0.0, 256, 64, "xla"),
        (TPU, jnp.bfloat16, 0.0, 256, 64, "tpu"),
        (TPU, jnp.bfloat16, 0.0, 256, 256, "tpu"),
        (TPU, jnp.bfloat16, 0.0, 256, 192, "xla"),
        (TPU, jnp.bfloat16, 0.0, 200, 64, "xla"),
        (TPU, jnp.float32, 0.1, 256, 64, "xla"),
        (device("tpu", "TPU v3"), jnp.bfloat16, 0.0, 256, 64, "xla"),
    ],
)
def test_choice(monkeypatch, device, dtype, rate, length, size, chosen):
    monkeypatch.setattr(jax, "devices", lambda: [device])
    query = jax.ShapeDtypeStruct((1, 2, length, size), dtype)
    assert attention.choose(query, rate) == chosen
    if chosen == "triton":  # a JAX without it
        monkeypatch.setattr(attention, "_has_triton", lambda: False)
        assert attention.choose(query, rate) == ("xla" if rate else "cudnn")


@pytest.mark.parametrize(("length", "size"), [(256, 96), (40, 64)])
def test_what_the_kernels_are_not_made_for(monkeypatch, length, size):
    monkeypatch.setattr(axes, "device", lambda: H100)
    with pytest.raises(UserError, match=f"not heads of {size} and rows of {length}; set attention='auto'"):
        attention.check_rows("triton", size, [length])


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_the_kernels_run_on_gpus():
    with pytest.raises(UserError, match="attention='triton' runs on GPUs, not on CPU; set attention='auto'"):
        attention.attend_in_rows(*inputs(64, size=64), kind="triton")


def test_a_fused_kernel_has_no_dropout():
    keys = jax.random.split(jax.random.key(0), 1)
    with pytest.raises(UserError, match="attention='cudnn' has no dropout; set attention_dropout_rate"):
        attention.attend_in_rows(*inputs(8), kind="cudnn", dropout_rate=0.1, dropout_keys=keys)
