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
END, HOLE, HOLE_END, BASE, VALID, START = range(6)


class Steps(NamedTuple):
    """The steps, and each row's numbers. It is the same in all layers that share a window."""

    row: jax.Array  # int32[T]: of each step
    source: jax.Array  # int32[T]: row whose cache it reads
    tile: jax.Array  # int32[T]: of that row's cache
    flags: jax.Array  # int32[T]
    bounds: jax.Array  # int32[6, B]
    total: jax.Array  # int32: steps that count, the first so many


def steps(mask: BlockMask, entries: int, tile: int, slots: int, *, cache_end, hole=None,
          lengths=None, window: int = 0) -> Steps:  # fmt: skip
    """The steps of `pallas_kernels.block_attention` over a cache of `slots` in tiles of `tile`."""
    base = cache_end if hole is None else hole[0]  # the slot of clean entry 0
    end = jnp.minimum(cache_end, slots)
    none = jnp.zeros_like(end)
    hole, hole_end = (none, none) if hole is None else hole
    valid = jnp.full_like(end, mask.clean) if lengths is None else lengths
    start, start_all = none, none  # first slot that some query sees, and from where all do
    if window:
        places = place(mask, jnp.arange(entries)[None], valid[:, None])
        start = jnp.maximum(base + places.min(axis=1) - window + 1, 0)
        start_all = base + places.max(axis=1) - window + 1
    bounds = jnp.stack([end, hole, hole_end, base, valid, start]).astype(jnp.int32)

    end, hole, hole_end, start, start_all = (
        x[:, None] for x in (end, hole, hole_end, start, start_all)
    )
    lo = jnp.arange(-(-slots // tile))[None] * tile
    hi = lo + tile
    first, last = jnp.maximum(lo, start), jnp.minimum(hi, end)
    active = (first < last) & ~((hole <= first) & (last <= hole_end))
    apart = (hole >= hole_end) | (hole_end <= lo) | (hole >= hi)
    whole = (lo >= start_all) & (hi <= end) & apart
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
