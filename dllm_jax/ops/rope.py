"""Rotary position embedding (Su et al. 2021), half-rotation form: pairs are (i, i + H / 2)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rope_angles(
    positions: Int[Array, "B Q"], head_dim: int, theta: float
) -> tuple[Float[Array, "B Q H2"], Float[Array, "B Q H2"]]:
    """Cosines and sines of each position, float32, one pair for each of the head_dim / 2 planes."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "B Q N H"], cos: Float[Array, "B Q H2"], sin: Float[Array, "B Q H2"]
) -> Float[Array, "B Q N H"]:
    """Turns each head's planes by the angles of its position."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)
