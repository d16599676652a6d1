"""Models of the Hugging Face hub by address: hf://OWNER/NAME[@REVISION]."""

import os

from transformer_lm.errors import UserError
from transformer_lm.extras import optional_import

SCHEME = "hf://"
FILES = ["checkpoint_*", "sentencepiece_model"]  # what the original published; nothing else is asked for


def is_address(address: os.PathLike | str) -> bool:
    """Whether an address is one of the hub."""
    return os.fspath(address).startswith(SCHEME)


def fetch(address: str) -> str:
    """The local folder with a model's files, downloaded unless the hub's cache has them.

    huggingface_hub decides where the cache lies (HF_HOME), whether it may ask the network (HF_HUB_OFFLINE), and with
    which token (HF_TOKEN, or `hf auth login`).

    Raises:
      UserError: there is no such model or revision, or it cannot be reached.
    """
    hub = optional_import("huggingface_hub", "hf", f"The address {address}")
    repository, _, revision = address.removeprefix(SCHEME).partition("@")
    try:
        return hub.snapshot_download(repository, revision=revision or None, allow_patterns=FILES)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{address} cannot be fetched: {error} (addresses are hf://OWNER/NAME[@REVISION]; without a network, "
            "HF_HUB_OFFLINE=1 takes what the cache has)"
        ) from error
