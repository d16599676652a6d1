"""Pretrain Japanese language models with JAX and Flax."""

__version__ = "2.0.0.dev0"


def load(address, *, dtype: str = "float32"):
    """A trained model for generation and scoring; see `language_model.load`."""
    from transformer_lm import language_model  # here, so that the package itself is imported in no time

    return language_model.load(address, dtype=dtype)
