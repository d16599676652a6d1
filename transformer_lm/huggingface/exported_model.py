"""Model folders of the Hugging Face world: written for everybody's tools, and read back bit by bit.

config.json says which architecture computes the network, and under "transformer_lm" which network of ours it is;
model.safetensors (in shards above 5 GB, with model.safetensors.index.json) holds the tensors. A value that the
architecture's tensors hold rounded lies unrounded in the safetensors file's metadata.

Folders are untrusted: sizes are compared with what the files' headers declare before anything of that size is made,
what is read must be what would be written of it, and nothing is unpickled or executed.
"""

import base64
import contextlib
import dataclasses
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from flax import traverse_util

from transformer_lm import models
from transformer_lm.errors import UserError
from transformer_lm.extras import optional_import
from transformer_lm.files import is_file, local_copy, read_json, write_json
from transformer_lm.huggingface.architectures import NAMES, table_of
from transformer_lm.huggingface.tensor_tables import Sizes, Table, Tensor
from transformer_lm.transformer_config import TransformerConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PLAIN_NAME = r"[\w-][\w.-]*\.safetensors"  # of a file in the same folder
MAX_SHARD_BYTES = 5_000_000_000
OURS = "transformer_lm"  # the key of config.json, and the prefix in the metadata
# Keys of config.json that make no other logits of the same tokens, whatever they say.
HARMLESS = re.compile(
    r"\w+_pdrop|attention_dropout|summary_\w+|initializer_range|use_cache|gradient_checkpointing|(torch_)?dtype|"
    r"transformers_version|_?name_or_path|_commit_hash|_?attn_implementation\w*|max_window_layers|problem_type|"
    r"task_specific_params|chunk_size_feed_forward|id2label|label2id|return_dict|output_\w+|"
    r"(unk|sep|cls|mask|decoder_start)_token_id"
)
TOLERANCE = 1e-5  # of a tensor's greatest value: what is computed again, perhaps by another NumPy, differs less


def is_model(folder: epath.Path) -> bool:
    """Whether a folder holds a model in this format."""
    return (folder / WEIGHTS_FILE).exists() or (folder / INDEX_FILE).exists()


# Writing. -------------------------------------------------------------------------------------------------------------


def save(
    folder: Path,
    network: TransformerConfig,
    params: models.Params,
    step: int,
    *,
    has_turns: bool = False,
    max_shard: int = MAX_SHARD_BYTES,
):
    """Writes config.json and the tensors.

    Args:
      folder: an empty folder.
      network: what it computes.
      params: its parameters: NumPy arrays, float32.
      step: training steps behind it, for the record.
      has_turns: whether it was trained on conversations, for the record.
      max_shard: bytes above which there are several files.
    """
    numpy_format = optional_import("safetensors.numpy", "hf", "The export")
    hub = optional_import("huggingface_hub", "hf", "The export")
    table = table_of(network)
    flat = traverse_util.flatten_dict(params, sep=".")
    rows = {name: (row, i) for name, row, i in layered(table)}
    split = hub.split_state_dict_into_shards_factory(
        {name: row.shape(table.sizes) for name, (row, _) in rows.items()},
        get_storage_size=lambda shape: 4 * int(np.prod(shape)),
        filename_pattern=WEIGHTS_FILE.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=max_shard,
    )
    source = {"model": network.to_json(), "step": step, "has_turns": has_turns}
    write_json(folder / CONFIG_FILE, {**table.settings, "dtype": "float32", OURS: source})
    for file, names in split.filename_to_tensors.items():
        tensors, metadata = {}, {"format": "pt"}  # which transformers 4 asks for
        for name in names:
            row, i = rows[name]
            ours = parameters(flat, row, i)
            tensors[name] = np.ascontiguousarray(row.export(table.sizes, *ours))
            if row.rounds:
                metadata[f"{OURS}:{name}"] = base64.b64encode(ours[0].astype("<f4").tobytes()).decode()
        numpy_format.save_file(tensors, folder / file, metadata)
        shutil.copymode(folder / CONFIG_FILE, folder / file)  # the library's own lets nobody else read
    if split.is_sharded:
        write_json(folder / INDEX_FILE, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def layered(table: Table) -> Iterator[tuple[str, Tensor, int]]:
    """Every tensor's name, with its row of the table and its layer."""
    for row in table.tensors:
        for i in range(row.count(table.sizes)):
            yield row.name.format(i=i), row, i


def parameters(flat: dict[str, np.ndarray], row: Tensor, layer: int) -> list[np.ndarray]:
    """What a row is made of, from our parameters by their dotted names."""
    return [flat[name][layer] if name.startswith("blocks.") else flat[name] for name in row.ours]


# Reading. -------------------------------------------------------------------------------------------------------------


def load(folder: epath.Path) -> tuple[TransformerConfig, models.Params, int]:
    """The network, its parameters (NumPy arrays, float32, layers stacked) and its training steps.

    Memory: the parameters, and at one time one more tensor or two.

    Raises:
      UserError: it is another architecture, was changed since it was written, or is no model at all.
    """
    network, step = _described(folder)
    table = table_of(network)
    sizes, files = table.sizes, _open(folder)
    _check_shapes(folder, table, files)
    flat: dict[str, np.ndarray] = {}
    for name, row, i in layered(table):
        theirs = files[name].get_tensor(name)
        if row.restore is None:
            ours = parameters(flat, row, i)
        else:
            ours = _restored(row, sizes, theirs, (files[name].metadata() or {}).get(f"{OURS}:{name}"))
            _place(flat, row, i, sizes.layers, ours)
        _check_unchanged(folder, name, theirs, row.export(sizes, *ours))
    return dataclasses.replace(network, dtype="float32"), traverse_util.unflatten_dict(flat, sep="."), step


def describe(folder: epath.Path) -> TransformerConfig:
    """The network of a folder; reads config.json alone, and raises UserError as `load` does."""
    return _described(folder)[0]


def has_turns(folder: epath.Path) -> bool:
    """Whether config.json says of the model that it was trained on conversations."""
    ours = read_json(folder / CONFIG_FILE).get(OURS)
    return isinstance(ours, dict) and ours.get("has_turns") is True


def _described(folder: epath.Path) -> tuple[TransformerConfig, int]:
    """What config.json says: our network, and its steps."""
    path = folder / CONFIG_FILE
    settings = read_json(path)
    names, ours = settings.get("architectures"), settings.get(OURS)
    if names not in [[name] for name in NAMES] or not isinstance(ours, dict):
        name = names[0] if isinstance(names, list) and len(names) == 1 else names
        raise UserError(
            f"{folder} holds a model of the architecture {str(name)[:80]} that export_huggingface.py has not written; "
            f"read are its exports ({', '.join(NAMES)}), workdirs, and the original's checkpoint_N."
        )
    network = TransformerConfig.from_json(ours.get("model"), str(path))
    step = ours.get("step")
    if type(step) is not int or step < 0:
        raise UserError(f"{path}: {OURS}.step={str(step)[:80]} is not a number of steps.")
    _check_settings(path, settings, table_of(network))
    return network, step


def _check_settings(path: epath.Path, settings: dict[str, Any], table: Table):
    """Raises UserError where config.json says of the network what the table does not, or leaves out what it says."""
    needed = table.neutral | table.settings
    for key in [*needed, *(settings.keys() - needed.keys() - {OURS})]:
        may_be_absent = key in table.neutral or key.endswith("_token_id")
        if HARMLESS.fullmatch(key) or (key not in settings and may_be_absent):
            continue
        found = f"{key}={str(settings[key])[:80]}" if key in settings else f"{key} is missing"
        if key not in needed:
            raise UserError(f"{path}: {found}, which no export has: the model was changed since it was exported.")
        if key not in settings or not _agrees(settings[key], needed[key]):
            raise UserError(
                f"{path}: {found}, but the network under {OURS!r} needs {needed[key]}: the model was changed since it "
                "was exported."
            )


def _agrees(value: Any, needed: Any) -> bool:
    """Whether config.json has a value; of a list, whether it has no others, however many layers it is for."""
    if isinstance(value, list) and isinstance(needed, list):
        return all(element in needed for element in value)
    return value == needed


def _open(folder: epath.Path) -> dict[str, Any]:
    """For each tensor's name the opened file that it lies in."""
    safetensors = optional_import("safetensors", "hf", f"The model in {folder}")
    files = [WEIGHTS_FILE]
    if not (folder / WEIGHTS_FILE).exists():
        places = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(places, dict) or not all(re.fullmatch(PLAIN_NAME, str(name)) for name in places.values()):
            raise UserError(f"{folder / INDEX_FILE}: weight_map is not a map to .safetensors files beside it.")
        files = sorted(set(places.values()))
    found = {}
    for file in files:
        path = folder / file
        if not is_file(path):
            raise UserError(f"{path} is missing, or no file; copy or download the model again.")
        try:
            opened = safetensors.safe_open(os.fspath(local_copy(path)), framework="np", backend="pread")
            found |= dict.fromkeys(opened.keys(), opened)
        except (safetensors.SafetensorError, ValueError) as error:
            raise UserError(f"{path} is damaged or not a safetensors file ({error}).") from error
    return found


def _check_shapes(folder: epath.Path, table: Table, files: dict[str, Any]):
    """Raises UserError unless the files hold every tensor in the shape that the network needs, and no others."""
    sizes = table.sizes
    expected = sum(row.count(sizes) for row in table.tensors)
    if expected != len(files):  # before all are looked for, as many as config.json pleases
        raise UserError(f"{folder}: the network of {CONFIG_FILE} has {expected} tensors, the files {len(files)}.")
    for name, row, _ in layered(table):
        if name not in files:
            raise UserError(f"{folder}: the tensor {name} is missing.")
        header = files[name].get_slice(name)
        shape, dtype = tuple(header.get_shape()), header.get_dtype()
        if (shape, dtype) != (row.shape(sizes), "F32"):
            raise UserError(
                f"{folder}: the tensor {name} is {dtype}{list(shape)}, and must be F32{list(row.shape(sizes))}; "
                "export writes float32 alone."
            )


def _restored(row: Tensor, sizes: Sizes, theirs: np.ndarray, kept: str | None) -> tuple[np.ndarray, ...]:
    """Our parameters in a tensor; of a rounded one those kept beside it, if they are the ones that were rounded."""
    ours = row.restore(sizes, theirs)
    if row.rounds and kept:
        with contextlib.suppress(ValueError):  # not base64, or of another length
            value = np.frombuffer(base64.b64decode(kept), "<f4").reshape(ours[0].shape)
            if np.array_equal(row.export(sizes, value), theirs):
                return (value,)
    return ours


def _check_unchanged(folder: epath.Path, name: str, theirs: np.ndarray, again: np.ndarray):
    """Raises UserError where a tensor is not what would be written of it."""
    if not _greatest(again - theirs) <= TOLERANCE * _greatest(again):  # nor if a value is NaN
        raise UserError(
            f"{folder}: the tensor {name} is not one that export_huggingface.py writes: the model was trained or "
            "changed elsewhere, and this project's network cannot compute it any more."
        )


def _greatest(x: np.ndarray) -> np.float32:
    """The greatest absolute value, without an array of them."""
    return np.maximum(x.max(), -x.min())


def _place(flat: dict[str, np.ndarray], row: Tensor, layer: int, layers: int, ours: tuple[np.ndarray, ...]):
    """Puts a row's parameters where they belong; the first layer makes room for all."""
    for name, value in zip(row.ours, ours, strict=True):
        if not name.startswith("blocks."):
            flat[name] = np.array(value, np.float32, order="C")
            continue
        if name not in flat:
            flat[name] = np.empty((layers, *value.shape), np.float32)
        flat[name][layer] = value
