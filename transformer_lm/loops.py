"""How the layers of a network run one after the other."""

import jax

from transformer_lm import axes

AT_ONCE = 32  # layers that are written out, at most: more only take longer to compile


def over_layers(run_layer, x, layers, *, for_gradient: bool):
    """As jax.lax.scan.

    On GPUs layers of which a gradient is taken are written out: in a loop XLA copies all that it needs into arrays of
    all layers, and out of them again, a sixth of a step. Not where a device has only a part of the parameters: there a
    loop gathers a layer's each time that they are needed, and written out all of them would stay.

    Args:
      run_layer: (x, one of the layers) -> x, and what is gathered.
      x: what goes through them.
      layers: arrays [L, ...].
      for_gradient: whether a gradient is taken, of what is kept until then.
    """
    number = len(jax.tree.leaves(layers)[0])
    written_out = for_gradient and jax.default_backend() == "gpu" and axes.ways("emb_dim") == 1
    turns = -(-number // AT_ONCE) if written_out else number
    return jax.lax.scan(run_layer, x, layers, unroll=-(-number // turns))
