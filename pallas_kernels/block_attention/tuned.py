"""How the TPU kernel cuts a cache into tiles: a heuristic, and what a tuner found better.

A grid step of the kernel costs scalar work whatever it reads, so a tile is as long as it takes for
its transfer to hide that; a longer one only makes the last tile of every row waste more.
"""

import json
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.platform import device_kind

# Bytes of a grid step, of which two are in flight, and slots of a softmax update. Slower memory
# needs less in flight; a longer update hides its products better, and spills more registers.
_CUTS = {"TPU v5 lite": (1 << 19, 256), "TPU v5e": (1 << 19, 256)}
_OTHER = 1 << 20, 512
# An int8 tile takes longer to compute than to arrive: a longer one fills and drains the units less.
_INT8 = 1 << 20, 256
_MOST_SLOTS = 2048  # small heads are not bound by memory, and waste a longer tile; int8: twice that
_LANES = 128


class Tiling(NamedTuple):
    """Sizes of one call of the kernel, all static."""

    tile: int  # cache slots of a grid step
    part: int  # of them in one softmax update; divides `tile`
    rows: int  # query rows of one update, at most


# What is faster than the heuristic, by `key`; scripts/bench/tune_kernels.py writes it on a device.
TUNED: dict[str, list[int]] = json.loads(Path(__file__).with_suffix(".json").read_text())


def key(rows: int, head: int, dtype) -> str:
    """What `TUNED` calls such a call on the device that is compiled for; rows by powers of two."""
    rows = 1 << (rows - 1).bit_length()
    return f"{device_kind()}, {rows} rows, head {head}, {jnp.dtype(dtype).name}"


def tiling(rows: int, head: int, dtype, slots: int, tile: int | None = None,
           piece: int = 0) -> Tiling:  # fmt: skip
    """Tiling for `rows` query rows of a kv head against a cache of `slots` slots of `2 * head`.

    Args:
      rows: queries times query heads of one kv head.
      head: its size, as it lies in the cache.
      dtype: of the cache.
      tile: slots of a grid step, if the caller knows better.
      piece: slots that a whole number of tiles must fill; 0: any.
    """
    dtype = jnp.dtype(dtype)
    known = TUNED.get(key(rows, head, dtype))
    if known is not None:
        found = Tiling(*known)
    else:
        widened = dtype == jnp.int8
        size, part = _INT8 if widened else _CUTS.get(device_kind(), _OTHER)
        slots_moved = size // (2 * head * dtype.itemsize) // _LANES * _LANES
        once = _LANES if -(-rows // _LANES) % 2 else 2 * _LANES  # as the rows pad least
        most = _MOST_SLOTS * (1 + widened)
        found = Tiling(min(max(slots_moved, _LANES), most), part, once)
    if tile is None:
        longest = -(-slots // _LANES) * _LANES
        tile = _divisor(piece, found.tile) if piece else min(found.tile, longest)
    return Tiling(tile, _divisor(tile, found.part), found.rows)


def _divisor(tile: int, most: int) -> int:
    """The longest part of a tile, in whole lanes where the tile is, that is not above `most`."""
    step = _LANES if tile % _LANES == 0 else tile
    return max(p for p in range(step, max(most, step) + 1, step) if tile % p == 0)
