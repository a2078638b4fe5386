"""Which tiles of which rows' caches a pass reads, as a list without idle steps.

row 0   own entries, tile 0, tile 1, tile 2 (cut)     write
row 1   own entries                                   write       its cache is empty
row 2   own entries, tile 3 (cut), tile 4, ...        write       a window begins in tile 3
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.masks import BlockMask

# What a step does: begin a row with its own entries, read a tile as it is, or one of which an end,
# a hole or a window cuts a part off, and end the row.
FIRST, LAST, WHOLE, CUT = 1, 2, 4, 8

# What the numbers of a row are.
END, HOLE, HOLE_END, VALID, START = range(5)


class Reach(NamedTuple):
    """The slots [first, end) that each query sees, but for a hole and for tiles left out."""

    first: jax.Array  # int32[B, Q], or [B, 1] where the queries of a row are alike
    end: jax.Array  # likewise


class Steps(NamedTuple):
    """The steps, and each row's numbers. It is the same in all layers that share a window."""

    row: jax.Array  # int32[T]: of each step
    source: jax.Array  # int32[T]: row whose cache it reads
    tile: jax.Array  # int32[T]: of that row's cache
    flags: jax.Array  # int32[T]
    bounds: jax.Array  # int32[5, B]
    total: jax.Array  # int32: steps that count, the first so many


def reach(mask: BlockMask, entries: int, *, cache_end, hole=None, lengths=None,
          window: int = 0) -> Reach:  # fmt: skip
    """What each query of `pallas_kernels.block_attention` sees of its row's cache."""
    end = cache_end.reshape(len(cache_end), -1)
    if not window:
        return Reach(jnp.zeros_like(end), end)
    base = end if hole is None else hole[0][:, None]  # the slot of clean entry 0
    valid = jnp.int32(mask.clean) if lengths is None else lengths[:, None]
    first = base + place(mask, jnp.arange(entries)[None], valid) - window + 1
    return Reach(jnp.maximum(first, 0), jnp.broadcast_to(end, first.shape))


def steps(seen: Reach, valid, tile: int, slots: int, *, hole=None, chosen=None) -> Steps:
    """The steps over a cache of `slots` in tiles of `tile`.

    Args:
      valid: int32[B], clean entries of each row, which are the kernel's to look after.
      chosen: bool[B, M], which of M equal pieces of the cache are read; `tile` divides a piece.
    """
    lowest, start = seen.end.min(axis=1), seen.first.min(axis=1)
    end, start_all = jnp.minimum(seen.end.max(axis=1), slots), seen.first.max(axis=1)
    none = jnp.zeros_like(end)
    hole, hole_end = (none, none) if hole is None else hole
    bounds = jnp.stack([end, hole, hole_end, valid, start]).astype(jnp.int32)

    end, lowest, hole, hole_end, start, start_all = (
        x[:, None] for x in (end, lowest, hole, hole_end, start, start_all)
    )
    lo = jnp.arange(-(-slots // tile))[None] * tile
    hi = lo + tile
    first, last = jnp.maximum(lo, start), jnp.minimum(hi, end)
    active = (first < last) & ~((hole <= first) & (last <= hole_end))
    if chosen is not None:
        active &= jnp.repeat(chosen, lo.shape[1] // chosen.shape[1], axis=1)
    apart = (hole >= hole_end) | (hole_end <= lo) | (hole >= hi)
    whole = (lo >= start_all) & (hi <= jnp.minimum(lowest, end)) & apart
    step = active.at[:, 0].set(active[:, 0] | ~active.any(axis=1))  # the own entries need one
    done = jnp.cumsum(step, axis=1)
    flags = FIRST * (done == 1) + LAST * (done == done[:, -1:])
    flags += jnp.where(active, jnp.where(whole, WHOLE, CUT), 0)

    # The t-th pair that is a step, as a sum over all: a TPU has no fast sort, scatter or gather.
    pair = jnp.arange(step.size)
    chosen = step.reshape(-1) & (jnp.cumsum(step.reshape(-1)) == pair[:, None] + 1)
    # A step that reads nothing asks for the tile that is there already: no transfer.
    held = lax.cummax(jnp.where(active.reshape(-1), pair, 0))
    pair, held, flags = (
        jnp.where(chosen, x.reshape(-1), 0).sum(axis=1) for x in (pair, held, flags)
    )
    tiles = lo.shape[1]
    lists = (pair // tiles, held // tiles, held % tiles, flags)
    row, source, tile_of, flags = (x.astype(jnp.int32) for x in lists)
    return Steps(row, source, tile_of, flags, bounds, step.sum(dtype=jnp.int32))


def place(mask: BlockMask, index, valid):
    """Where queries stand among the clean entries: a noisy one behind those that it sees."""
    return jnp.where(index < mask.clean, index, jnp.minimum(mask.clean_end(index), valid))
