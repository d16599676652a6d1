"""Pretrain Japanese language models with JAX and Flax."""

from transformer_lm.version import __version__ as __version__


def load(address, *, dtype: str = "float32"):
    """A trained model for generation and scoring; see `language_model.load`."""
    from transformer_lm.generation import language_model  # here, so that the package itself is imported in no time

    return language_model.load(address, dtype=dtype)
