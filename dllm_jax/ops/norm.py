"""Normalisation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*B D"], scale: Float[Array, "D"] | None, eps: float
) -> Float[Array, "*B D"]:
    """Root-mean-square norm over the last axis (Zhang and Sennrich 2019), in float32, cast back."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    if scale is not None:
        wide = wide * scale.astype(jnp.float32)
    return wide.astype(x.dtype)


def layer_norm(
    x: Float[Array, "*B D"], scale: Float[Array, "D"], eps: float
) -> Float[Array, "*B D"]:
    """Layer norm over the last axis (Ba et al. 2016), without a bias, in float32, cast back."""
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale.astype(jnp.float32)).astype(x.dtype)
