"""Save, restore, find: the checkpoints of a workdir (Orbax), and those of the original (msgpack).

A workdir holds checkpoints/STEP/ with three items: params (all that generation needs), opt_state, and progress (step
and running totals). The original's `checkpoint_N` is one msgpack file with step, params and opt_state; it is read here
by a streaming reader that keeps the parameters alone and never unpickles or executes anything.
"""

import dataclasses
import json
import os
import re
import shutil
from typing import Any, BinaryIO

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import traverse_util
from orbax.checkpoint import checkpoint_managers

from transformer_lm import files, models
from transformer_lm.checkpoints import hub, msgpack_arrays
from transformer_lm.checkpoints.msgpack_arrays import StoredArray
from transformer_lm.errors import UserError
from transformer_lm.files import absolute, local_copy, read_json, write_atomically
from transformer_lm.huggingface import exported_model
from transformer_lm.tokenizer import Tokenizer

CHECKPOINTS_DIR = "checkpoints"
DAMAGED_DIR = "damaged_checkpoints"
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "sentencepiece_model"


class Checkpoints:
    """The checkpoints of a workdir: atomic, written in the background, the latest `keep` retained."""

    def __init__(self, workdir: os.PathLike | str, keep: int = 1):
        self._directory = epath.Path(workdir) / CHECKPOINTS_DIR
        self._manager = ocp.CheckpointManager(
            absolute(self._directory),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.LatestN(keep), cleanup_tmp_directories=True
            ),
            item_names=("params", "opt_state", "progress"),
        )

    @property
    def steps(self) -> list[int]:
        """The steps that are there, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, params: Any, opt_state: Any, progress: Any):
        """Copies the arrays, then writes them in the background. Waits for an unfinished save before.

        Raises:
          UserError: this save, or the one before, failed (a full disk, say). Earlier checkpoints are as they were.
        """
        with _explained(self._directory):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params),
                    opt_state=ocp.args.StandardSave(opt_state),
                    progress=ocp.args.StandardSave(progress),
                ),
                force=True,
            )

    def wait(self):
        """Returns when nothing is being written any more; raises UserError as `save` does."""
        with _explained(self._directory):
            self._manager.wait_until_finished()

    def restore(self, params: Any, opt_state: Any, progress: Any) -> tuple[Any, Any, Any] | None:
        """The newest checkpoint that can be read, or None where there is none at all.

        A damaged one is reported, set aside in workdir/damaged_checkpoints, and the one before it is used.

        Args:
          params, opt_state, progress: trees of `jax.ShapeDtypeStruct` with shardings, which the result takes.

        Raises:
          UserError: there are checkpoints, and none of them can be read.
        """
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(params),
            opt_state=ocp.args.StandardRestore(opt_state),
            progress=ocp.args.StandardRestore(progress),
        )
        steps = self.steps[::-1]
        for step in steps:
            try:
                restored = self._manager.restore(step, args=args)
            except Exception as error:  # whatever a damaged file makes Orbax raise
                aside = self._directory.parent / DAMAGED_DIR / str(step)
                logging.error("Checkpoint %d is damaged (%s); moved to %s.", step, _first_line(error), aside)
                aside.parent.mkdir(parents=True, exist_ok=True)
                if aside.exists():
                    aside.rmtree()
                (self._directory / str(step)).rename(aside)
                self._manager.reload()
                continue
            return restored["params"], restored["opt_state"], restored["progress"]
        if steps:
            raise UserError(
                f"None of the checkpoints {steps} in {self._directory} can be read; they were moved to {DAMAGED_DIR}/. "
                "Start again without them to train from the beginning."
            )
        return None

    def close(self):
        """Waits for the last save and lets go of the folder."""
        self.wait()
        self._manager.close()


class _explained:  # noqa: N801  (a context manager, named like a function)
    """Turns a failed write into a UserError."""

    def __init__(self, directory):
        self._directory = directory

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is not None and isinstance(error, Exception):
            free = shutil.disk_usage(self._directory).free / 2**20 if os.path.isdir(self._directory) else float("nan")
            raise UserError(
                f"A checkpoint could not be written to {self._directory} ({_first_line(error)}; {free:.0f} MiB free). "
                "Earlier checkpoints are unharmed: make room and run the same command again."
            ) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model as it lies somewhere, ready for generation; no optimizer.

    Attributes:
      config: the network, dtype "float32" (what to compute in is the user's choice).
      params: NumPy arrays, float32.
      step: training steps behind it.
      tokenizer_path: the SentencePiece model beside it.
    """

    config: models.TransformerConfig
    params: models.Params
    step: int
    tokenizer_path: epath.Path


def load_model(address: os.PathLike | str) -> LoadedModel:
    """Loads a model for generation.

    Args:
      address: a workdir of this project, a folder with the original's `checkpoint_N` and `sentencepiece_model`, such
        a `checkpoint_N` itself, a folder that export_huggingface.py wrote, or hf://OWNER/NAME[@REVISION].

    Raises:
      UserError: there is no model, or it cannot be read.
    """
    path = _fetched(address)
    if path.is_file():
        return _load_original(path)
    if (path / CONFIG_FILE).exists() and (path / CHECKPOINTS_DIR).exists():
        return _load_workdir(path)
    numbered = [(int(match[1]), child) for child in path.iterdir() if (match := _ORIGINAL_NAME.fullmatch(child.name))]
    if numbered:
        return _load_original(max(numbered)[1])
    if exported_model.is_model(path):
        return LoadedModel(*exported_model.load(path), path / TOKENIZER_FILE)
    raise UserError(
        f"No model in {path}: neither a trained workdir ({CONFIG_FILE} and {CHECKPOINTS_DIR}/), nor an original "
        f"checkpoint (checkpoint_N), nor an exported folder ({exported_model.WEIGHTS_FILE})."
    )


def _fetched(address: os.PathLike | str) -> epath.Path:
    path = epath.Path(hub.fetch(address) if hub.is_address(address) else address).expanduser()
    if not path.exists():
        raise UserError(f"No model at {path}: no such file or folder.")
    return path


def load_initial(
    address: str | None, model: models.TransformerConfig, workdir: os.PathLike | str
) -> LoadedModel | None:
    """The model that a run begins with; None without an address, or where the workdir has checkpoints to go on from.

    Raises:
      UserError: there is no such model, or it is another network than the run's.
    """
    kept = (child.name for child in files.children(epath.Path(workdir) / CHECKPOINTS_DIR))
    if not address or any(map(str.isdigit, kept)):  # others are what an interrupted first save left
        return None
    loaded = load_model(address)
    wanted = dataclasses.replace(model, vocab_size=loaded.config.vocab_size)  # which the tokenizer decides
    _check_same_network(f"init_from={address}", loaded.config, wanted)
    return loaded


def initial_tokenizer(
    address: str | None, model: models.TransformerConfig, workdir: os.PathLike | str
) -> epath.Path | None:
    """The tokenizer of the model that `load_initial` loads, which has been found to fit."""
    initial = load_initial(address, model, workdir)
    return initial and initial.tokenizer_path


def claim_workdir(workdir: epath.Path, recipe: dict, model: models.TransformerConfig, tokenizer: Tokenizer):
    """Writes config.json (the recipe, the network as it is) and sentencepiece_model, before a run.

    Raises:
      UserError: the workdir holds checkpoints of another network or tokenizer, which a run would spoil.
    """
    if (workdir / CHECKPOINTS_DIR).exists() and (workdir / CONFIG_FILE).exists():
        before, fingerprint = read_run_config(workdir)
        _check_same_network(str(workdir), before, model)
        if fingerprint != tokenizer.fingerprint:
            raise UserError(f"{workdir} holds a model of another tokenizer; restore that, or use another --workdir.")
    content = {"recipe": recipe, "model": dataclasses.asdict(model), "tokenizer_sha256": tokenizer.fingerprint}
    write_atomically(workdir / TOKENIZER_FILE, tokenizer.model)
    write_atomically(workdir / CONFIG_FILE, json.dumps(content, ensure_ascii=False, indent=1).encode())


def _check_same_network(place: str, before: models.TransformerConfig, model: models.TransformerConfig):
    """Raises UserError where the model at a place has other parameters than the run's."""
    for name in _SHAPING_FIELDS:
        old, new = getattr(before, name), getattr(model, name)
        if old != new:
            raise UserError(
                f"{place} holds a model with {name}={old}, but this run has {name}={new}; "
                "use its value, or name another."
            )


_SHAPING_FIELDS = (
    "vocab_size", "emb_dim", "num_heads", "num_layers", "qkv_dim", "mlp_dim", "logits_via_embedding",
)  # fmt: skip


def read_run_config(workdir: epath.Path) -> tuple[models.TransformerConfig, str]:
    """The network and the tokenizer's hash in a workdir's config.json; raises UserError if it is not such a file."""
    path = workdir / CONFIG_FILE
    content = read_json(path)
    return models.TransformerConfig.from_json(content.get("model"), str(path)), content.get("tokenizer_sha256", "")


def _load_workdir(workdir: epath.Path) -> LoadedModel:
    config, _ = read_run_config(workdir)
    cpu = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cpu), models.abstract_params(config)
    )
    manager = ocp.CheckpointManager(
        absolute(workdir / CHECKPOINTS_DIR),
        options=ocp.CheckpointManagerOptions(read_only=True, create=False),
        item_names=("params", "opt_state", "progress"),
    )
    steps = sorted(manager.all_steps(), reverse=True)
    for step in steps:
        try:
            params = manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(target)))["params"]
        except Exception as error:
            logging.error("Checkpoint %d is damaged (%s); trying the one before.", step, _first_line(error))
            continue
        return LoadedModel(
            dataclasses.replace(config, dtype="float32"),
            jax.tree.map(np.asarray, params),
            step,
            workdir / TOKENIZER_FILE,
        )
    raise UserError(f"No checkpoint in {workdir / CHECKPOINTS_DIR} can be read (steps: {steps or 'none'}).")


# The original's checkpoints. ------------------------------------------------------------------------------------------

_ORIGINAL_NAME = re.compile(r"checkpoint_(\d+)")

# Our name -> the original's, below "decoder"; {i} is the layer.
_ORIGINAL_NAMES = {
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


def _load_original(path: epath.Path) -> LoadedModel:
    """The model in an original `checkpoint_N`; the network's sizes follow from the arrays' shapes.

    The parameters are read into their place one by one: at no time is there a second copy of more than one of them.
    """
    match = _ORIGINAL_NAME.fullmatch(path.name)
    local = local_copy(path)
    try:
        with open(local, "rb") as file:
            stored = msgpack_arrays.read_entry(file, os.path.getsize(local), "params")
            if not isinstance(stored, dict) or not isinstance(stored.get("decoder"), dict):
                raise UserError(f"{path} is not a checkpoint of the original: it holds no params.")
            params = _read_original_params(path, file, _flatten(stored["decoder"]))
    except msgpack_arrays.TruncatedError as error:
        raise UserError(f"{path} is truncated ({error}); copy or download it again.") from error
    except msgpack_arrays.MalformedError as error:
        raise UserError(f"{path} is not a checkpoint of the original: {error}.") from error
    config = _original_config(path, params)
    shapes = jax.tree.map(lambda x: x.shape, models.abstract_params(config))
    if shapes != jax.tree.map(np.shape, params):
        raise UserError(f"{path}: the shapes of its arrays do not belong together.")
    return LoadedModel(config, params, int(match[1]) if match else 0, path.parent / TOKENIZER_FILE)


def _read_original_params(path: epath.Path, file: BinaryIO, arrays: dict[str, StoredArray]) -> models.Params:
    """Our tree of parameters, float32, layers stacked, from the original's arrays."""
    layers = len({name.split(".")[0] for name in arrays if name.startswith("encoderdecoderblock_")})
    wanted: dict[str, list[StoredArray]] = {}
    for ours, theirs in _ORIGINAL_NAMES.items():
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


def _original_config(path: epath.Path, params: models.Params) -> models.TransformerConfig:
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
