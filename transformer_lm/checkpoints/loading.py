"""From any address to a model: a workdir, an original checkpoint, an exported folder, the hub."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable

import jax
import numpy as np
from absl import logging
from etils import epath

from transformer_lm import models
from transformer_lm.checkpoints import hub, original, store
from transformer_lm.checkpoints import workdir as contract
from transformer_lm.checkpoints.workdir import CHECKPOINTS_DIR, CONFIG_FILE, TOKENIZER_FILE
from transformer_lm.errors import UserError
from transformer_lm.files import is_file, path_of, read_json
from transformer_lm.huggingface import exported_model
from transformer_lm.tokenizer import Tokenizer
from transformer_lm.tokenizer.turns import Turns


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model as it lies somewhere, ready for generation; no optimizer.

    Attributes:
      config: the network, dtype "float32" (what to compute in is the user's choice).
      params: NumPy arrays, float32.
      step: training steps behind it.
      tokenizer_path: the SentencePiece model beside it.
      has_turns: whether it was trained on conversations.
    """

    config: models.TransformerConfig
    params: models.Params
    step: int
    tokenizer_path: epath.Path
    has_turns: bool

    def tokenizer(self) -> tuple[Tokenizer, Turns | None]:
        """Its tokenizer, and how it takes turns; None for a model that only continues texts.

        Raises:
          UserError: the tokenizer does not belong to it, or can do no turns.
        """
        return _read_tokenizer(self.tokenizer_path, self.config, self.has_turns)


@dataclasses.dataclass(frozen=True)
class FoundModel:
    """A model that was found somewhere, and described; its parameters are not read yet.

    Attributes:
      network: what it computes.
      tokenizer_path: the SentencePiece model beside it.
      has_turns: whether it was trained on conversations.
      read: reads network, parameters and steps, as `LoadedModel` has them.
    """

    network: models.TransformerConfig
    tokenizer_path: epath.Path
    has_turns: bool
    read: Callable[[], tuple[models.TransformerConfig, models.Params, int]]

    def tokenizer(self) -> tuple[Tokenizer, Turns | None]:
        """As that of `LoadedModel`."""
        return _read_tokenizer(self.tokenizer_path, self.network, self.has_turns)

    def load(self) -> LoadedModel:
        """Reads its parameters; raises UserError if they cannot be read."""
        return LoadedModel(*self.read(), self.tokenizer_path, self.has_turns)


def _read_tokenizer(
    path: epath.Path, network: models.TransformerConfig, has_turns: bool
) -> tuple[Tokenizer, Turns | None]:
    found = Tokenizer.load_for(path, network.vocab_size)
    return found, Turns.of(found) if has_turns else None


def load_model(address: os.PathLike | str) -> LoadedModel:
    """Loads a model for generation.

    Args:
      address: as `find_model` takes it.

    Raises:
      UserError: there is no model, or it cannot be read.
    """
    return find_model(address).load()


def find_model(address: os.PathLike | str) -> FoundModel:
    """Finds a model, without reading its parameters.

    Args:
      address: a workdir of this project, a folder with the original's `checkpoint_N` and `sentencepiece_model`, such
        a `checkpoint_N` itself, a folder that export_huggingface.py wrote, or hf://OWNER/NAME[@REVISION].

    Raises:
      UserError: there is no model, or it cannot be read.
    """
    if not isinstance(address, str | os.PathLike):
        raise UserError(f"{address!r} is no address of a model: give a folder or a file, or hf://OWNER/NAME.")
    if str(address).startswith(("http://", "https://")):
        raise UserError(f"{address} is a web page: name a model of the hub as hf://OWNER/NAME, or download it.")
    path = path_of(hub.fetch(address) if hub.is_address(address) else address).expanduser()
    if not path.exists():
        raise UserError(f"No model at {path}: no such file or folder.")
    if is_file(path):
        return _found(path, original.describe, original.load, folder=path.parent)
    if (path / CONFIG_FILE).exists() and (path / CHECKPOINTS_DIR).exists():
        return _found(path, _describe_workdir, _load_workdir, folder=path, has_turns=contract.has_turns(path))
    numbered = original.checkpoints_in(path)
    if single := [child for child in numbered if is_file(child)]:
        return _found(single[-1], original.describe, original.load, folder=path)
    if exported_model.is_model(path):
        has_turns = exported_model.has_turns(path)
        return _found(path, exported_model.describe, exported_model.load, folder=path, has_turns=has_turns)
    if numbered or original.NAME.fullmatch(path.name):
        raise UserError(
            f"{numbered[-1] if numbered else path} is a folder, as today's Flax writes its checkpoints; of the "
            "original's only single files checkpoint_N are read."
        )
    raise UserError(
        f"No model in {path}: neither a trained workdir ({CONFIG_FILE} and {CHECKPOINTS_DIR}/), nor an original "
        f"checkpoint (checkpoint_N), nor an exported folder ({exported_model.WEIGHTS_FILE})."
    )


def find_initial(address: str | None, network: models.TransformerConfig, workdir: str) -> FoundModel | None:
    """The model that a run begins with; None without an address, or where the workdir has checkpoints to go on from.

    Raises:
      UserError: there is no such model, it is another network than the run's, or the workdir holds another's model,
        which a run beside it would hide or write over.
    """
    place = epath.Path(workdir)
    if contract.has_checkpoints(place):
        if (place / CONFIG_FILE).exists():
            before, _ = contract.read_run_config(place)
            contract.check_same_network(workdir, before, dataclasses.replace(network, vocab_size=before.vocab_size))
        return None
    if (place / CONFIG_FILE).exists() and "tokenizer_sha256" not in read_json(place / CONFIG_FILE):
        raise UserError(
            f"{workdir} holds a {CONFIG_FILE} that is no run's, and would be written over; use another --workdir "
            f"(to begin with an exported model: --config.init_from={workdir})."
        )
    if originals := original.checkpoints_in(place):
        raise UserError(
            f"{workdir} holds {originals[-1].name} of the original system, which trains no further; to begin with its "
            f"weights: --config.init_from={workdir} --workdir=ANOTHER."
        )
    if not address:
        return None
    try:
        found = find_model(address)
    except UserError as error:
        raise UserError(f"init_from={address}: {error}") from error
    wanted = dataclasses.replace(network, vocab_size=found.network.vocab_size)  # which the tokenizer decides
    contract.check_same_network(f"init_from={address}", found.network, wanted)
    return found


def _found(
    path: epath.Path, describe: Callable, load: Callable, folder: epath.Path, has_turns: bool = False
) -> FoundModel:
    return FoundModel(describe(path), folder / TOKENIZER_FILE, has_turns, functools.partial(load, path))


def _describe_workdir(workdir: epath.Path) -> models.TransformerConfig:
    return contract.read_run_config(workdir)[0]


def _load_workdir(workdir: epath.Path) -> tuple[models.TransformerConfig, models.Params, int]:
    """The newest checkpoint that can be read; a workdir that is only read stays as it is."""
    network = _describe_workdir(workdir)
    cpu = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    target = jax.tree.map(lambda x: x.update(sharding=cpu), models.abstract_params(network))
    failures: dict[int, str] = {}
    with contextlib.closing(store.Checkpoints(workdir, read_only=True)) as saved:
        for step in saved.steps[::-1]:
            try:
                params = saved.restore_params(step, target)
            except UserError:
                raise
            except Exception as error:  # whatever a damaged file makes Orbax raise
                failures[step] = store.first_line(error)
                logging.error("Checkpoint %d cannot be read (%s); trying the one before.", step, failures[step])
                continue
            return dataclasses.replace(network, dtype="float32"), jax.tree.map(np.asarray, params), step
    why = "; ".join(f"step {step}: {error}" for step, error in failures.items()) or "there is none"
    raise UserError(f"No checkpoint in {workdir / CHECKPOINTS_DIR} can be read ({why}).")
