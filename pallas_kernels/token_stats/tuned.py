"""Tile sizes of the kernels, by what was measured on a device, else by a rule."""

import json
from pathlib import Path

import jax.numpy as jnp

from pallas_kernels.platform import device_kind

# What is faster than the rule, by `key`; scripts/bench/tune_kernels.py writes it on a device.
TUNED: dict[str, int] = json.loads(Path(__file__).with_suffix(".json").read_text())

_BYTES = 8 << 20  # of a tile of the vocabulary, of which there are two in VMEM


def key(dim: int, dtype) -> str:
    """What `TUNED` calls a vocabulary of vectors of `dim` on the device that is compiled for."""
    return f"{device_kind()}, vectors of {dim}, {jnp.dtype(dtype).name}"


def tile_for(dim: int, dtype) -> int:
    """Tokens of a tile of the vocabulary: a multiple of 128, from 128 to 2,048."""
    if (found := TUNED.get(key(dim, dtype))) is not None:
        return found
    return min(max(_BYTES // (dim * jnp.dtype(dtype).itemsize) // 128 * 128, 128), 2048)
