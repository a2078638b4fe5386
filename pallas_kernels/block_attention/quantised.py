"""An int8 cache: one scale for the keys and one for the values of each row and kv head.

A stored byte x stands for x * scale. What is written later must live with the scale that was chosen
first: beyond 127 times it, it is clipped.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8


def quantise(
    kv: Float[Array, "*rows S P"], scale: Float32[Array, "*rows 2"]
) -> Int8[Array, "*rows S P"]:
    """Keys and values as an int8 cache holds them: rounded to the nearest, clipped to ±127.

    Args:
      kv: as in the cache, keys in the first half of the last axis and values in the second.
      scale: of keys and of values, positive; largest magnitude / 127 clips nothing.
    """
    return jnp.clip(jnp.round(kv / _lanes(scale, kv.shape[-1])), -127, 127).astype(jnp.int8)


def dequantise(
    kv: Int8[Array, "*rows S P"], scale: Float32[Array, "*rows 2"]
) -> Float32[Array, "*rows S P"]:
    """What the bytes of an int8 cache stand for."""
    return kv * _lanes(scale, kv.shape[-1])


def _lanes(scale, width: int):
    """Each half's scale over its lanes, [..., 1, P]."""
    return jnp.repeat(scale, width // 2, axis=-1)[..., None, :]
