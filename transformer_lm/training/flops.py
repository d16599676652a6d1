"""How much a step computes, and how much a device could."""

import functools
import time

import jax
import jax.numpy as jnp
from absl import logging

from transformer_lm import models

# Peak dense bfloat16 FLOP/s of one device, from the makers' data sheets; by jax.Device.device_kind.
PEAK_FLOPS = {
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def flops_per_token(network: models.TransformerConfig, length: int) -> float:
    """Model FLOPs of forward and backward pass a token (Chowdhery et al. 2022, appendix B): 6 N + 12 L H K T.

    N counts the parameters that are multiplied: all but the embedding table, which is only looked up.
    """
    multiplied = models.count_params(network)
    if not network.logits_via_embedding:
        multiplied -= network.vocab_size * network.emb_dim
    return 6.0 * multiplied + 12.0 * network.num_layers * network.qkv_dim * length


def peak_flops(device: jax.Device) -> float:
    """Peak FLOP/s of a device: bfloat16 by its maker's data sheet, else those of a measured product in float32."""
    if device.device_kind in PEAK_FLOPS:
        return PEAK_FLOPS[device.device_kind]
    return measured_flops()


@functools.cache
def measured_flops(size: int = 1024, seconds: float = 0.1) -> float:
    """FLOP/s of the fastest product of float32 matrices [size, size] within some time, on the default device."""
    a = jnp.ones((size, size), jnp.float32)
    multiply = jax.jit(jnp.matmul)
    multiply(a, a).block_until_ready()
    taken = []
    while sum(taken) < seconds:
        start = time.perf_counter()
        multiply(a, a).block_until_ready()
        taken.append(time.perf_counter() - start)
    logging.info("mfu is a share of a matrix product's speed here: %.0f GFLOP/s.", 2e-9 * size**3 / min(taken))
    return 2.0 * size**3 / min(taken)
