"""From any address to a model: a workdir, an original checkpoint, an exported folder, the hub."""

import dataclasses
import os

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from transformer_lm import files, models
from transformer_lm.checkpoints import hub, original
from transformer_lm.checkpoints.store import first_line
from transformer_lm.checkpoints.workdir import (
    CHECKPOINTS_DIR,
    CONFIG_FILE,
    TOKENIZER_FILE,
    check_same_network,
    read_run_config,
)
from transformer_lm.errors import UserError
from transformer_lm.files import absolute
from transformer_lm.huggingface import exported_model


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
        return _loaded_original(path)
    if (path / CONFIG_FILE).exists() and (path / CHECKPOINTS_DIR).exists():
        return _load_workdir(path)
    numbered = [(int(match[1]), child) for child in path.iterdir() if (match := original.NAME.fullmatch(child.name))]
    if numbered:
        return _loaded_original(max(numbered)[1])
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
    address: str | None, network: models.TransformerConfig, workdir: os.PathLike | str
) -> LoadedModel | None:
    """The model that a run begins with; None without an address, or where the workdir has checkpoints to go on from.

    Raises:
      UserError: there is no such model, or it is another network than the run's.
    """
    kept = (child.name for child in files.children(epath.Path(workdir) / CHECKPOINTS_DIR))
    if not address or any(map(str.isdigit, kept)):  # others are what an interrupted first save left
        return None
    loaded = load_model(address)
    wanted = dataclasses.replace(network, vocab_size=loaded.config.vocab_size)  # which the tokenizer decides
    check_same_network(f"init_from={address}", loaded.config, wanted)
    return loaded


def initial_tokenizer(
    address: str | None, network: models.TransformerConfig, workdir: os.PathLike | str
) -> epath.Path | None:
    """The tokenizer of the model that `load_initial` loads, which has been found to fit."""
    initial = load_initial(address, network, workdir)
    return initial and initial.tokenizer_path


def _loaded_original(path: epath.Path) -> LoadedModel:
    return LoadedModel(*original.load(path), path.parent / TOKENIZER_FILE)


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
            logging.error("Checkpoint %d is damaged (%s); trying the one before.", step, first_line(error))
            continue
        return LoadedModel(
            dataclasses.replace(config, dtype="float32"),
            jax.tree.map(np.asarray, params),
            step,
            workdir / TOKENIZER_FILE,
        )
    raise UserError(f"No checkpoint in {workdir / CHECKPOINTS_DIR} can be read (steps: {steps or 'none'}).")
