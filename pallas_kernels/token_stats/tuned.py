"""Tile sizes of the kernels, by what was measured on a device, else by a rule."""

import jax.numpy as jnp

# (device kind, hidden size, itemsize) -> tokens of a tile. A tuner fills it on a device.
TUNED: dict[tuple[str, int, int], int] = {}

_BYTES = 8 << 20  # of a tile of the vocabulary, of which there are two in VMEM


def tile_for(dim: int, dtype, device_kind: str = "") -> int:
    """Tokens of a tile of the vocabulary: a multiple of 128, from 128 to 2,048."""
    itemsize = jnp.dtype(dtype).itemsize
    if (found := TUNED.get((device_kind, dim, itemsize))) is not None:
        return found
    return min(max(_BYTES // (dim * itemsize) // 128 * 128, 128), 2048)
