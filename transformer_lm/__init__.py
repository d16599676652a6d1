"""Pretrain Japanese language models with JAX and Flax."""

__version__ = "2.0.0.dev0"
