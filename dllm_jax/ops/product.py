"""The product of a pass's entries with weights."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dllm_jax.sharding import axis_sizes
from pallas_kernels.platform import device_kind


def product(x: Float[Array, "B Q D"], weight: Float[Array, "D *O"]) -> Float[Array, "B Q *O"]:
    """`x` times `weight` over its first axis, in their dtype.

    On CPUs the entries of all rows are one axis. The gradient of a weight is a product over the
    entries: over two axes XLA transposes its operands there, and makes what they come from anew
    column by column. A mesh may split the two, so they stay two there.

    There `jax_default_matmul_precision` "bfloat16" rounds operands in float32, as it does on TPUs.
    """
    if device_kind() != "cpu" or axis_sizes():
        return jnp.einsum("bqd,d...->bq...", x, weight)
    flat, matrix = x.reshape(-1, x.shape[-1]), weight.reshape(len(weight), -1)
    out = _narrow(flat, matrix) if _rounded(x, weight) else flat @ matrix
    return out.reshape(*x.shape[:2], *weight.shape[1:])


def _rounded(x, weight) -> bool:
    """Whether the operands are bfloat16, or meant to be."""
    if x.dtype != weight.dtype or x.dtype not in (jnp.bfloat16, jnp.float32):
        return False
    wanted = jax.config.jax_default_matmul_precision  # pyrefly: ignore
    return x.dtype == jnp.bfloat16 or wanted == "bfloat16"


@jax.custom_vjp
def _narrow(x, matrix) -> jax.Array:
    """The product of both in bfloat16, summed in float32, as its gradients are; in their dtype.

    Processors with AMX have instructions for it, several times as fast as those for float32. XLA
    uses them where operands are bfloat16 and the result is float32. JAX's own gradient of that
    multiplies float32, and so does JAX 0.10 where the result is bfloat16.
    """
    return _forward(x, matrix)[0]


def _forward(x, matrix):
    narrow = x.astype(jnp.bfloat16), matrix.astype(jnp.bfloat16)
    return _dot(*narrow, 1, 0).astype(x.dtype), narrow


def _backward(saved, grad):
    x, matrix = saved
    narrow = grad.astype(jnp.bfloat16)
    found = _dot(narrow, matrix, 1, 1), _dot(_transposed(x), narrow, 1, 0)
    return tuple(own.astype(grad.dtype) for own in found)


_narrow.defvjp(_forward, _backward)


def _dot(a, b, axis: int, other: int) -> jax.Array:
    dimensions = (((axis,), (other,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _transposed(x) -> jax.Array:
    """`x.T`, in parts: in one XLA makes it part of the product, which is in float32 then."""
    part = math.gcd(len(x), 32)
    return jnp.transpose(x.reshape(-1, part, x.shape[1]), (2, 0, 1)).reshape(x.T.shape)
