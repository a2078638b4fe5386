"""How the TPU kernel cuts a cache into tiles: a heuristic, and what a tuner found better.

A grid step of the kernel costs scalar work whatever it reads, so a tile is as long as it takes for
its transfer to hide that; a longer one only makes the last tile of every row waste more.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Bytes of a grid step, of which two are in flight, and slots of a softmax update. Slower memory
# needs less in flight; a longer update hides its products better, and spills more registers.
_CUTS = {"TPU v5 lite": (1 << 19, 256), "TPU v5e": (1 << 19, 256)}
_OTHER = 1 << 20, 512
_MOST_SLOTS = 2048  # small heads are not bound by memory, and waste a longer tile
_LANES = 128


class Tiling(NamedTuple):
    """Sizes of one call of the kernel, all static."""

    tile: int  # cache slots of a grid step
    part: int  # of them in one softmax update; divides `tile`
    rows: int  # query rows of one update, at most


# (kind of device, query rows of a kv head up to a power of two, head size, dtype of the cache) ->
# what is faster there.
TUNED: dict[tuple[str, int, int, str], Tiling] = {}


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
    found = TUNED.get((_device(), _bucket(rows), head, dtype.name))
    if found is None:
        size, part = _CUTS.get(_device(), _OTHER)
        slots_moved = size // (2 * head * dtype.itemsize) // _LANES * _LANES
        once = _LANES if -(-rows // _LANES) % 2 else 2 * _LANES  # as the rows pad least
        found = Tiling(min(max(slots_moved, _LANES), _MOST_SLOTS), part, once)
    if tile is None:
        longest = -(-slots // _LANES) * _LANES
        tile = _divisor(piece, found.tile) if piece else min(found.tile, longest)
    return Tiling(tile, _divisor(tile, found.part), found.rows)


def _bucket(rows: int) -> int:
    """The next power of two: what `TUNED` knows of so many query rows."""
    return 1 << (rows - 1).bit_length()


def _device() -> str:
    """The kind of device that is compiled for: of the mesh in scope, or the one that is here."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    return abstract.device_kind if abstract else jax.devices()[0].device_kind


def _divisor(tile: int, most: int) -> int:
    """The longest part of a tile, in whole lanes where the tile is, that is not above `most`."""
    step = _LANES if tile % _LANES == 0 else tile
    return max(p for p in range(step, max(most, step) + 1, step) if tile % p == 0)
