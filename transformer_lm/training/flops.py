"""How much a step computes, and how much a device could."""

import jax

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


def peak_flops(device: jax.Device) -> float | None:
    """Peak bfloat16 FLOP/s of a device, None where it is not known (a CPU)."""
    return PEAK_FLOPS.get(device.device_kind)
