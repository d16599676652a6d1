"""How much a step computes, and how much a device could."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from transformer_lm import models

# Peak dense bfloat16 FLOP/s of one device, from the makers' data sheets; by jax.Device.device_kind.
PEAK_FLOPS = {
    "TPU v2": 45e12 / 2,
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}


def flops_per_token(network: models.TransformerConfig, length: int) -> float:
    """Model FLOPs of forward and backward pass a token (Chowdhery et al. 2022, appendix B): 6 N + 12 L H K T.

    N counts the parameters that are multiplied: all but the embedding table, which is only looked up.
    """
    multiplied = models.count_params(network)
    if not network.logits_via_embedding:
        multiplied -= network.vocab_size * network.emb_dim
    return 6.0 * multiplied + 12.0 * network.num_layers * network.qkv_dim * length


def peak_flops(device: jax.Device, count: int) -> float:
    """Peak FLOP/s of so many devices: bfloat16 by their maker's data sheet, else those of a measured product."""
    if device.platform == "cpu":
        return measured_flops()  # of the processor, which all of them share
    return count * (PEAK_FLOPS.get(device.device_kind) or measured_flops(jnp.bfloat16, size=4096, products=8))


@functools.cache
def measured_flops(dtype=jnp.float32, size: int = 1024, products: int = 1, seconds: float = 0.1) -> float:
    """FLOP/s of matrix products on the default device, the fastest time of those within some seconds.

    Args:
      dtype: of the matrices, [size, size].
      size: their rows.
      products: in one call, one after the other: on an accelerator a call takes longer than a small product.
      seconds: how long to measure.
    """
    ones, mean = jax.device_put((np.ones((size, size), dtype), np.full((size, size), 1 / size, dtype)))
    multiply = jax.jit(lambda x: jax.lax.fori_loop(0, products, lambda _, x: x @ mean, x))
    multiply(ones).block_until_ready()
    taken = []
    while sum(taken) < seconds:
        start = time.perf_counter()
        multiply(ones).block_until_ready()
        taken.append(time.perf_counter() - start)
    speed = 2.0 * products * size**3 / min(taken)
    logging.info("mfu is a share of a matrix product's speed here: %.0f GFLOP/s.", 1e-9 * speed)
    return speed
