"""How the layers of a network run one after the other."""

import jax

AT_ONCE = 32  # layers that are written out, at most: more only take longer to compile


def over_layers(run_layer, x, layers, *, recomputed: bool):
    """As jax.lax.scan.

    On GPUs the layers are written out: in a loop XLA copies all that the gradient needs into arrays of all layers, and
    out of them again, a sixth of a step. What is computed again going backwards stays in a loop, where XLA cannot see
    that it was computed before.

    Args:
      run_layer: (x, one of the layers) -> x, and what is gathered.
      x: what goes through them.
      layers: arrays [L, ...].
      recomputed: whether run_layer is a jax.checkpoint.
    """
    unroll = AT_ONCE if jax.default_backend() == "gpu" and not recomputed else 1
    return jax.lax.scan(run_layer, x, layers, unroll=unroll)
