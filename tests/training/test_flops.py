"""Counted FLOPs, against XLA's own count."""

import itertools
import types

import jax
import numpy as np
import pytest

from transformer_lm import models
from transformer_lm.data import packing
from transformer_lm.training import flops, optimizers
from transformer_lm.training.flops import flops_per_token
from transformer_lm.training.state import init_state
from transformer_lm.training.step import make_train_step

ADAM = optimizers.OptimizerConfig(learning_rate=0.01, warmup_steps=10, weight_decay=0.1)


def test_flops_against_xla():
    """The formula, against what XLA counts in a compiled step without the scan's hiding of layers."""
    model = models.TransformerConfig(
        vocab_size=512, emb_dim=128, num_heads=4, num_layers=1, qkv_dim=128, mlp_dim=512, dropout_rate=0.0,
        attention_dropout_rate=0.0,
    )  # fmt: skip
    length = 512  # the formula's share of attention is a third
    batch = packing.unpack(np.full((4, length), 7, np.uint16))
    optimizer = optimizers.make_optimizer(ADAM)
    state = jax.eval_shape(lambda: init_state(model, optimizer, jax.random.key(0)))
    step = jax.jit(make_train_step(model, optimizer, 0.0))
    compiled = step.lower(state, batch, jax.eval_shape(lambda: jax.random.key(0))).compile()
    assert compiled.cost_analysis()["flops"] / (4 * length) == pytest.approx(flops_per_token(model, length), rel=0.1)


@pytest.mark.parametrize("products", [1, 4])
def test_a_measured_product(monkeypatch, products):
    """Of so many products of 2 N^3 operations that take a second together."""
    monkeypatch.setattr(flops, "time", types.SimpleNamespace(perf_counter=itertools.count().__next__))
    assert flops.measured_flops(size=64, products=products) == products * 2 * 64**3
