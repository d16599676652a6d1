"""Models of the Hugging Face hub by address: hf://OWNER/NAME[@REVISION]."""

import functools
import os
from pathlib import Path

from transformer_lm.errors import UserError
from transformer_lm.extras import optional_import

SCHEME = "hf://"
ORIGINAL_FILES = ["checkpoint_*", "sentencepiece_model"]  # what the original published
EXPORTED_FILES = ["config.json", "*.safetensors", "model.safetensors.index.json", "sentencepiece_model"]


def is_address(address: os.PathLike | str) -> bool:
    """Whether an address is one of the hub."""
    return os.fspath(address).startswith(SCHEME)


def fetch(address: str) -> str:
    """The local folder with a model's files, downloaded unless the hub's cache has them; of a repository no others.

    A repository that the original published has `checkpoint_N`; one without it must be an export of this project, to be
    seen by its `sentencepiece_model` before gigabytes of somebody else's model are fetched.

    huggingface_hub decides where the cache lies (HF_HOME), whether it may ask the network (HF_HUB_OFFLINE), and with
    which token (HF_TOKEN, or `hf auth login`).

    Raises:
      UserError: there is no such model or revision, or it cannot be reached.
    """
    hub = optional_import("huggingface_hub", "hf", f"The address {address}")
    repository, _, revision = address.removeprefix(SCHEME).partition("@")
    try:
        fetch = functools.partial(
            hub.snapshot_download, repository, revision=revision or None,
            ignore_patterns=["*/*"],  # what lies in folders of the repository is no part of the model
        )  # fmt: skip
        folder = fetch(allow_patterns=ORIGINAL_FILES)
        if list(Path(folder).glob("checkpoint_*")):
            return folder
        if not (Path(folder) / "sentencepiece_model").exists():
            raise UserError(f"{address} is no model of this project: it has no sentencepiece_model.")
        return fetch(allow_patterns=EXPORTED_FILES)
    except UserError:
        raise
    except Exception as error:  # whatever the hub's library, and the network's of its version, raise
        raise UserError(
            f"{address} cannot be fetched: {error} (addresses are hf://OWNER/NAME[@REVISION]; without a network, "
            "HF_HUB_OFFLINE=1 takes what the cache has)"
        ) from error
