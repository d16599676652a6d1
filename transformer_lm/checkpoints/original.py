"""The original's checkpoints: which parameter of ours is which array of theirs.

`checkpoint_N` is one msgpack file with step, params and opt_state; it is read by a streaming reader that keeps the
parameters alone and never unpickles or executes anything.
"""

import os
import re
from typing import Any, BinaryIO

import jax
import numpy as np
from etils import epath
from flax import traverse_util

from transformer_lm import models
from transformer_lm.checkpoints import msgpack_arrays
from transformer_lm.checkpoints.msgpack_arrays import StoredArray
from transformer_lm.errors import UserError
from transformer_lm.files import local_copy

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


def load(path: epath.Path) -> tuple[models.TransformerConfig, models.Params, int]:
    """The network, parameters and steps of an original `checkpoint_N`; sizes follow from the arrays' shapes.

    The parameters are read into their place one by one: at no time is there a second copy of more than one of them.
    """
    match = NAME.fullmatch(path.name)
    local = local_copy(path)
    try:
        with open(local, "rb") as file:
            stored = msgpack_arrays.read_entry(file, os.path.getsize(local), "params")
            if not isinstance(stored, dict) or not isinstance(stored.get("decoder"), dict):
                raise UserError(f"{path} is not a checkpoint of the original: it holds no params.")
            params = _read_params(path, file, _flatten(stored["decoder"]))
    except msgpack_arrays.TruncatedError as error:
        raise UserError(f"{path} is truncated ({error}); copy or download it again.") from error
    except msgpack_arrays.MalformedError as error:
        raise UserError(f"{path} is not a checkpoint of the original: {error}.") from error
    config = _config(path, params)
    shapes = jax.tree.map(lambda x: x.shape, models.abstract_params(config))
    if shapes != jax.tree.map(np.shape, params):
        raise UserError(f"{path}: the shapes of its arrays do not belong together.")
    return config, params, int(match[1]) if match else 0


def _read_params(path: epath.Path, file: BinaryIO, arrays: dict[str, StoredArray]) -> models.Params:
    """Our tree of parameters, float32, layers stacked, from the original's arrays."""
    layers = len({name.split(".")[0] for name in arrays if name.startswith("encoderdecoderblock_")})
    wanted: dict[str, list[StoredArray]] = {}
    for ours, theirs in _NAMES.items():
        names = [theirs.format(i=i) for i in range(layers)] if "{i}" in theirs else [theirs]
        if ours.startswith("logits.") and names[0] not in arrays:
            continue  # logits_via_embedding
        if not layers or not set(names) <= arrays.keys():
            raise UserError(f"{path} is not a checkpoint of the original's network: it has no {theirs}.")
        wanted[ours] = [arrays.pop(name) for name in names]
        if any(array.shape != wanted[ours][0].shape for array in wanted[ours]):
            raise UserError(f"{path}: layers differ in the shape of {theirs}.")
    if arrays:
        raise UserError(f"{path} is not a checkpoint of the original's network: {sorted(arrays)[0]} is unknown.")
    flat: dict[str, np.ndarray] = {}
    for ours, stored in wanted.items():
        value = np.empty((len(stored), *stored[0].shape), np.float32)
        for out, array in zip(value, stored, strict=True):
            array.read_into(file, out)
        flat[ours] = value if ours.startswith("blocks.") else value[0]
    return traverse_util.unflatten_dict(flat, sep=".")


def _config(path: epath.Path, params: models.Params) -> models.TransformerConfig:
    query = params["blocks"]["attention"]["query"]["kernel"]  # [L, D, H, K]
    mlp = params["blocks"]["mlp"]["wi"]["kernel"]  # [L, D, F]
    embedding = params["embed"]["embedding"]  # [V, D]
    if (query.ndim, mlp.ndim, embedding.ndim) != (4, 3, 2):
        raise UserError(f"{path}: the shapes of its arrays do not belong together.")
    return models.TransformerConfig(
        vocab_size=embedding.shape[0],
        emb_dim=embedding.shape[1],
        num_heads=query.shape[2],
        num_layers=query.shape[0],
        qkv_dim=query.shape[2] * query.shape[3],
        mlp_dim=mlp.shape[2],
        logits_via_embedding="logits" not in params,
    )


def _flatten(tree: Any, prefix: str = "") -> dict[str, StoredArray]:
    """{"a": {"b": x}} -> {"a.b": x}."""
    if isinstance(tree, StoredArray):
        return {prefix[:-1]: tree}
    if not isinstance(tree, dict):
        raise UserError(f"{prefix[:-1] or 'params'} is a {type(tree).__name__}, not an array.")
    return {name: leaf for key, child in tree.items() for name, leaf in _flatten(child, f"{prefix}{key}.").items()}
