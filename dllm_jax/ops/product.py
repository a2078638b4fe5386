"""The product of a pass's entries with weights."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dllm_jax.sharding import axis_sizes
from pallas_kernels.platform import device_kind


def product(x: Float[Array, "B Q D"], weight: Float[Array, "D *O"]) -> Float[Array, "B Q *O"]:
    """`x` times `weight` over its first axis, in their dtype.

    On CPUs the entries of all rows are one axis. The gradient of a weight is a product over the
    entries: over two axes XLA transposes its operands there, and makes what they come from anew
    column by column. A mesh may split the two, so they stay two there.
    """
    if device_kind() != "cpu" or axis_sizes():
        return jnp.einsum("bqd,d...->bq...", x, weight)
    flat = x.reshape(-1, x.shape[-1]) @ weight.reshape(len(weight), -1)
    return flat.reshape(*x.shape[:2], *weight.shape[1:])
