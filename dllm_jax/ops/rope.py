"""Rotary position embedding (Su et al. 2021), half-rotation form: pairs are (i, i + R / 2)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rope_angles(
    positions: Int[Array, "B Q"], rotary_dim: int, theta: float
) -> tuple[Float[Array, "B Q R2"], Float[Array, "B Q R2"]]:
    """Cosines and sines of each position, float32: one pair for each of rotary_dim / 2 planes."""
    frequency = theta ** (-jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "B Q N H"], cos: Float[Array, "B Q R2"], sin: Float[Array, "B Q R2"]
) -> Float[Array, "B Q N H"]:
    """Turns the planes of each head's first 2 * R2 dimensions; the others stay as they are."""
    turning, rest = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    left, right = jnp.split(turning.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)
