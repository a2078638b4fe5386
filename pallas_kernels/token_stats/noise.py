"""Noise of a token: a function of a key and the token's id alone, so tiles and shards change none.

Plain arithmetic on 32-bit words, so that the same function runs in XLA and inside a kernel.
"""

import jax
import jax.numpy as jnp

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def random_bits(key0: jax.Array, key1: jax.Array, ids: jax.Array) -> jax.Array:
    """32 random bits, uint32; the three uint32 arguments broadcast.

    Threefry-2x32 with 20 rounds (Salmon et al. 2011) of the counter (0, id), its two words folded
    into one: what `jax.random.bits(key, (V,))` gives at position `id`.
    """
    keys = (key0, key1, key0 ^ key1 ^ jnp.uint32(_PARITY))
    x0, x1 = jnp.broadcast_arrays(keys[0], ids + keys[1])
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = (x1 << jnp.uint32(rotation)) | (x1 >> jnp.uint32(32 - rotation))
            x1 = x1 ^ x0
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x0 ^ x1


def gumbel(key0: jax.Array, key1: jax.Array, ids: jax.Array) -> jax.Array:
    """Standard Gumbel noise of each id, float32, from 31 bits.

    Minus the logarithm of an exponential variable, which is taken from the nearer end of (0, 1):
    both tails keep their digits, and none is cut before a chance of 2 ** -32. (Noise cut early
    draws as at a lower temperature: Zheng et al. 2024, arXiv 2409.02908.)
    """
    return gumbel_of(random_bits(key0, key1, ids))


def gumbel_of(bits: jax.Array) -> jax.Array:
    """The noise that random bits, uint32, stand for."""
    whole = (bits >> jnp.uint32(1)).astype(jnp.int32)
    low = whole < (1 << 30)
    near = jnp.where(low, whole, jnp.int32(0x7FFFFFFF) - whole).astype(jnp.float32)
    share = (near + 0.5) * jnp.float32(2.0**-31)
    return -jnp.log(jnp.where(low, -jnp.log(share), -jnp.log1p(-share)))
