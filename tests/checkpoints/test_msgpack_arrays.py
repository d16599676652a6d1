"""The reader of Flax's msgpack files: against Flax's own, and against hostile ones."""

import io
import random
import struct

import jax
import numpy as np
import pytest
from conftest import memory_of_loading
from flax import serialization

from transformer_lm.checkpoints import msgpack_arrays
from transformer_lm.checkpoints.msgpack_arrays import MalformedError, StoredArray, TruncatedError

RNG = np.random.default_rng(0)
TREE = {
    "step": np.asarray(7, np.int32),
    "opt_state": {
        "0": {"count": np.zeros((), np.int32), "mu": RNG.normal(size=(300, 3)).astype(np.float32)},
        "1": None,
    },
    "params": {
        "decoder": {
            f"layer_{i}": {"kernel": RNG.normal(size=(i, 5)).astype(np.float32), "bias": RNG.normal(size=70 * i)}
            for i in range(20)
        },
        "half": RNG.normal(size=(2, 2, 2)).astype(np.float16),
        "epsilon": 1e-6,
        "name": "Ｌ" * 20,
        "steps": [1, -1, 200, -200, 70_000, -70_000, 2**40, -(2**40)],
    },
}


def read(content: bytes, name: str = "params"):
    return msgpack_arrays.read_entry(io.BytesIO(content), len(content), name)


def load(content: bytes, tree):
    """The tree with its arrays read, all as float64."""
    file = io.BytesIO(content)

    def one(leaf):
        if not isinstance(leaf, StoredArray):
            return leaf
        out = np.empty(leaf.shape, np.float64)
        leaf.read_into(file, out)
        return out

    return jax.tree.map(one, tree, is_leaf=lambda leaf: isinstance(leaf, StoredArray))


def test_as_flax_reads_it():
    content = serialization.msgpack_serialize(TREE)
    found = load(content, read(content))
    expected = serialization.msgpack_restore(content)["params"]
    expected["steps"] = list(expected["steps"].values()) if isinstance(expected["steps"], dict) else expected["steps"]
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_every_truncation_is_noticed():
    content = serialization.msgpack_serialize({"params": TREE["params"]})
    for length in [*range(200), *range(200, len(content), 397)]:
        with pytest.raises(TruncatedError):
            read(content[:length])


def test_mutated_files():
    """Many of them end in a tree or in an error, at once and without taking memory for what is only declared."""
    content = serialization.msgpack_serialize(TREE)
    dice = random.Random(0)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(1500):
        mutated = bytearray(content)
        for _ in range(dice.choice([1, 1, 2, 8, 64])):
            at = dice.randrange(len(mutated) if dice.random() < 0.3 else 400)
            kind = dice.randrange(3)
            if kind == 0:
                mutated[at] = dice.randrange(256)
            elif kind == 1:
                del mutated[at : at + dice.randrange(1, 9)]
            else:
                mutated[at:at] = dice.choice([b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\x81", b"\x91" * 50])
        try:
            load(bytes(mutated), read(bytes(mutated)))
            outcomes["read"] += 1
        except MalformedError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 125, outcomes


def array(shape: bytes, dtype: bytes, length: int, data: bytes = b"") -> bytes:
    """An array of Flax's, its parts written by hand."""
    body = b"\x93" + shape + dtype + b"\xc6" + struct.pack(">I", length) + data
    return b"\xc9" + struct.pack(">Ib", len(body), 1) + body


F32 = b"\xa7float32"


@pytest.mark.parametrize(
    "value",
    [
        b"\xdf\xff\xff\xff\xff",  # a map of four thousand million entries
        b"\xdd\xff\xff\xff\xff" + b"\x00" * 100,  # a list of as many
        b"\xdb\xff\xff\xff\xff",  # a text of 4 GB
        b"\xc6\xff\xff\xff\xff",  # bytes
        b"\x91" * 100_000 + b"\x00",  # lists in lists
        b"\x81\xa1a" * 100_000 + b"\x00",
        b"\xdd\x00\x02\x00\x00" + b"\x90" * 2**17,  # many empty lists
        b"\x81\x01\x01",  # a name that is a number
        b"\x81\xa2\xff\xfe\x01",  # a name that is not UTF-8
        b"\xc1",  # never used
        array(b"\x92\xce\xff\xff\xff\xff\xce\xff\xff\xff\xff", F32, 0),  # 64 exabytes
        array(b"\x91\xd0\xff", F32, 4, b"\0" * 4),  # a negative size
        array(b"\x91\x02", F32, 4, b"\0" * 4),  # two numbers in the bytes of one
        array(b"\x91\x01", b"\xa6object", 8, b"\0" * 8),
        array(b"\x91\x01", b"\xa3|V8", 8, b"\0" * 8),
        array(b"\x99" + b"\x01" * 9, F32, 4, b"\0" * 4),  # nine dimensions
        array(b"\xa1a", F32, 4, b"\0" * 4),
        array(b"\x91\xc3", F32, 4, b"\0" * 4),  # True for a size
    ],
)
def test_hostile_values(value, monkeypatch):
    monkeypatch.setattr(msgpack_arrays, "MAX_VALUES", 100_000)
    with pytest.raises(MalformedError):
        read(b"\x81\xa6params" + value)


def test_no_such_entry():
    with pytest.raises(MalformedError, match="holds no params"):
        read(serialization.msgpack_serialize({"step": 1, "opt_state": TREE["opt_state"]}))


def test_memory_at_the_width_of_the_published_model(tmp_path):
    """Weights as in japanese_0.1b_v1, of 4 layers and 10,000 pieces: loading takes at most 1.5 times the parameters."""
    f32 = np.float32
    norm = {"scale": np.ones(768, f32), "bias": np.zeros(768, f32)}
    heads = np.full((768, 12, 64), 0.5, f32)
    layer = {
        "LayerNorm_0": norm, "LayerNorm_1": norm,
        "SelfAttention_0": {
            **{name: {"kernel": heads} for name in ("query", "key", "value")},
            "out": {"kernel": heads.reshape(12, 64, 768)},
        },
        "MlpBlock_0": {
            "Dense_0": {"kernel": np.ones((768, 3072), f32), "bias": np.ones(3072, f32)},
            "Dense_1": {"kernel": np.ones((3072, 768), f32), "bias": np.ones(768, f32)},
        },
    }  # fmt: skip
    embedding = np.ones((10_000, 768), f32)
    decoder = {
        "Embed_0": {"embedding": embedding}, "encoderdecoder_norm": norm,
        "logitdense": {"kernel": embedding.reshape(768, 10_000), "bias": np.ones(10_000, f32)},
        **{f"encoderdecoderblock_{i}": layer for i in range(4)},
    }  # fmt: skip
    tree = {"step": 1, "opt_state": {"mu": embedding}, "params": {"decoder": decoder}}
    (tmp_path / "checkpoint_499999").write_bytes(serialization.msgpack_serialize(tree))
    used, parameters = memory_of_loading(tmp_path)
    assert parameters > 150e6
    assert used < 1.5 * parameters
