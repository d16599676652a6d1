"""How the layers of a network run one after the other, and what of them is kept for their gradient."""

import jax
from jax.ad_checkpoint import checkpoint_name

from transformer_lm import axes

AT_ONCE = 32  # layers that are written out, at most: more only take longer to compile
KEPT = "kept"  # name of what is kept besides products
CUDNN = "dot_product_attention_fwd_wrapper"  # JAX's own primitive, whose results have no name

_products_and_named = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, jax.checkpoint_policies.save_only_these_names(KEPT)
)


def _is_kept(primitive, *arrays, **options) -> bool:
    return primitive.name == CUDNN or _products_and_named(primitive, *arrays, **options)


def keep(x):
    """An array that the gradient of a layer is to find, since making it again would take as long as a product."""
    return checkpoint_name(x, KEPT)


def over_layers(run_layer, x, layers, *, for_gradient: bool, remat: str):
    """As jax.lax.scan.

    For the gradient a layer keeps its products with weights, and what is named by `keep` or made by cuDNN. The rest,
    elementwise but for attention written out for XLA, is made again: that takes less time than writing it to memory and
    reading it, and a third to two thirds of the memory.

    On GPUs layers of which a gradient is taken are written out, and keep all: in a loop XLA copies all that is kept
    into arrays of all layers, and out of them again, a sixth of a step. Not where a device has only a part of the
    parameters: there a loop gathers a layer's each time that they are needed, and written out all of them would stay.

    Args:
      run_layer: (x, one of the layers) -> x, and what is gathered.
      x: what goes through them.
      layers: arrays [L, ...].
      for_gradient: whether a gradient is taken, of what is kept until then.
      remat: "block" keeps the input of each layer alone.
    """
    number = len(jax.tree.leaves(layers)[0])
    whole_on_gpu = axes.device().platform == "gpu" and axes.ways("emb_dim") == 1
    if for_gradient and whole_on_gpu and remat == "none":
        turns = -(-number // AT_ONCE)
        return jax.lax.scan(run_layer, x, layers, unroll=-(-number // turns))
    policy = None if remat == "block" else _is_kept
    return jax.lax.scan(jax.checkpoint(run_layer, prevent_cse=False, policy=policy), x, layers)
