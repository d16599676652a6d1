"""The original's checkpoints: which parameter of ours is which array of theirs.

`checkpoint_N` is one msgpack file with step, params and opt_state; it is read by a streaming reader that keeps the
parameters alone and never unpickles or executes anything.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from etils import epath
from flax import traverse_util

from transformer_lm import models
from transformer_lm.checkpoints import msgpack_arrays
from transformer_lm.checkpoints.msgpack_arrays import StoredArray
from transformer_lm.errors import UserError
from transformer_lm.files import children, local_copy

NAME = re.compile(r"checkpoint_(\d+)")

# Our name -> the original's, below "decoder"; {i} is the layer.
_NAMES = {
    "embed.embedding": "Embed_0.embedding",
    "norm.scale": "encoderdecoder_norm.scale",
    "norm.bias": "encoderdecoder_norm.bias",
    "logits.kernel": "logitdense.kernel",
    "logits.bias": "logitdense.bias",
    "blocks.attention_norm.scale": "encoderdecoderblock_{i}.LayerNorm_0.scale",
    "blocks.attention_norm.bias": "encoderdecoderblock_{i}.LayerNorm_0.bias",
    "blocks.attention.query.kernel": "encoderdecoderblock_{i}.SelfAttention_0.query.kernel",
    "blocks.attention.key.kernel": "encoderdecoderblock_{i}.SelfAttention_0.key.kernel",
    "blocks.attention.value.kernel": "encoderdecoderblock_{i}.SelfAttention_0.value.kernel",
    "blocks.attention.out.kernel": "encoderdecoderblock_{i}.SelfAttention_0.out.kernel",
    "blocks.mlp_norm.scale": "encoderdecoderblock_{i}.LayerNorm_1.scale",
    "blocks.mlp_norm.bias": "encoderdecoderblock_{i}.LayerNorm_1.bias",
    "blocks.mlp.wi.kernel": "encoderdecoderblock_{i}.MlpBlock_0.Dense_0.kernel",
    "blocks.mlp.wi.bias": "encoderdecoderblock_{i}.MlpBlock_0.Dense_0.bias",
    "blocks.mlp.wo.kernel": "encoderdecoderblock_{i}.MlpBlock_0.Dense_1.kernel",
    "blocks.mlp.wo.bias": "encoderdecoderblock_{i}.MlpBlock_0.Dense_1.bias",
}


def checkpoints_in(folder: epath.Path) -> list[epath.Path]:
    """What is named `checkpoint_N` in a folder, the newest last: the original's files, and today's Flax's folders."""
    numbered = [(int(match[1]), child) for child in children(folder) if (match := NAME.fullmatch(child.name))]
    return [child for _, child in sorted(numbered)]


def describe(path: epath.Path) -> models.TransformerConfig:
    """The network of an original `checkpoint_N`, whose sizes follow from the arrays' shapes; reads no array."""
    with _opened(path) as (_, arrays):
        return _network(path, arrays)


def load(path: epath.Path) -> tuple[models.TransformerConfig, models.Params, int]:
    """The network, parameters (NumPy arrays, float32, layers stacked) and steps of an original `checkpoint_N`.

    The parameters are read into their place one by one: at no time is there a second copy of more than one of them.
    """
    match = NAME.fullmatch(path.name)
    flat: dict[str, np.ndarray] = {}
    with _opened(path) as (file, arrays):
        network = _network(path, arrays)
        for ours, stored in arrays.items():
            value = np.empty((len(stored), *stored[0].shape), np.float32)
            for out, array in zip(value, stored, strict=True):
                array.read_into(file, out)
            flat[ours] = value if ours.startswith("blocks.") else value[0]
    return network, traverse_util.unflatten_dict(flat, sep="."), int(match[1]) if match else 0


@contextlib.contextmanager
def _opened(path: epath.Path) -> Iterator[tuple[BinaryIO, dict[str, list[StoredArray]]]]:
    """The file, and where the arrays of each of our parameters lie in it, one a layer."""
    local = local_copy(path)
    try:
        with open(local, "rb") as file:
            stored = msgpack_arrays.read_entry(file, os.path.getsize(local), "params")
            if not isinstance(stored, dict) or not isinstance(stored.get("decoder"), dict):
                raise UserError(f"{path} is not a checkpoint of the original: it holds no params.")
            yield file, _by_our_names(path, traverse_util.flatten_dict(stored["decoder"], sep="."))
    except msgpack_arrays.TruncatedError as error:
        raise UserError(f"{path} is truncated ({error}); copy or download it again.") from error
    except msgpack_arrays.MalformedError as error:
        raise UserError(f"{path} is not a checkpoint of the original: {error}.") from error


def _by_our_names(path: epath.Path, arrays: dict[str, Any]) -> dict[str, list[StoredArray]]:
    for name, value in arrays.items():
        if not isinstance(value, StoredArray):
            raise UserError(f"{path}: {name} is a {type(value).__name__}, not an array.")
    layers = len({name.split(".")[0] for name in arrays if name.startswith("encoderdecoderblock_")})
    found: dict[str, list[StoredArray]] = {}
    for ours, theirs in _NAMES.items():
        names = [theirs.format(i=i) for i in range(layers)] if "{i}" in theirs else [theirs]
        if ours.startswith("logits.") and names[0] not in arrays:
            continue  # logits_via_embedding
        if not layers or not set(names) <= arrays.keys():
            raise UserError(f"{path} is not a checkpoint of the original's network: it has no {theirs}.")
        found[ours] = [arrays.pop(name) for name in names]
        if any(array.shape != found[ours][0].shape for array in found[ours]):
            raise UserError(f"{path}: layers differ in the shape of {theirs}.")
    if arrays:
        raise UserError(f"{path} is not a checkpoint of the original's network: {sorted(arrays)[0]} is unknown.")
    return found


def _network(path: epath.Path, arrays: dict[str, list[StoredArray]]) -> models.TransformerConfig:
    """The network that has arrays of these shapes; raises UserError where there is none."""
    shapes = {
        name: (len(stored), *stored[0].shape) if name.startswith("blocks.") else stored[0].shape
        for name, stored in arrays.items()
    }
    query, mlp = shapes["blocks.attention.query.kernel"], shapes["blocks.mlp.wi.kernel"]  # [L, D, H, K], [L, D, F]
    embedding = shapes["embed.embedding"]  # [V, D]
    if (len(query), len(mlp), len(embedding)) == (4, 3, 2):
        network = models.TransformerConfig(
            vocab_size=embedding[0], emb_dim=embedding[1], num_layers=query[0], num_heads=query[2],
            qkv_dim=query[2] * query[3], mlp_dim=mlp[2], logits_via_embedding="logits.kernel" not in arrays,
        )  # fmt: skip
        expected = traverse_util.flatten_dict(models.abstract_params(network), sep=".")
        if shapes == {name: value.shape for name, value in expected.items()}:
            return network
    raise UserError(f"{path}: the shapes of its arrays do not belong together.")
