"""The steps of a pass over its own clean keys: the tiles of `tiles`, and what rows make of them.

query tile 0   keys 0 (stepped)                      write
query tile 1   keys 0, keys 1 (stepped)              write
query tile 2   keys 0 (empty), keys 1 (cut), ...     write       a document begins in key tile 1

Which tiles there are is static; lengths and documents of a row empty some of them and cut others.
A step that turns out empty asks for the keys that are there already, and does nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.block_attention.tiles import seen, tiles
from pallas_kernels.masks import BlockMask

# What a step does: begin a query tile, read a tile of keys as it is, or one of which some pair is
# not seen, and end the query tile. STEPPED is a CUT tile on a diagonal: its queries before i * part
# see nothing of the keys from i * part on.
FIRST, LAST, WHOLE, CUT, STEPPED = 1, 2, 4, 8, 16


class Steps(NamedTuple):
    """The steps, by query tile; R is 1 where rows do not differ, and B where they do."""

    query: np.ndarray  # int32[T]: query tile of each step
    key: jax.Array  # int32[R, T]: tile of keys
    flags: jax.Array  # int32[R, T]
    first: jax.Array  # int32[R, Qp]: keys that a query sees, [first, end); [0, 0) if none
    end: jax.Array  # int32[R, Qp]


def steps(mask: BlockMask, entries: int, tile_q: int, tile_k: int, part: int, *, lengths=None,
          segments=None, window: int = 0) -> Steps:  # fmt: skip
    """The steps of `flash_tpu.over_clean`, its arguments as there.

    Args:
      part: queries and keys of a step of the stairs, a divisor of both tiles.
    """
    query, key, _ = tiles(mask, entries, tile_q, tile_k, window, ragged=lengths is not None)
    blind = np.setdiff1d(np.arange(-(-entries // tile_q), dtype=np.int32), query)
    order = np.argsort(np.concatenate([query, blind]), kind="stable")
    query = np.concatenate([query, blind])[order]
    key = np.concatenate([key, np.zeros_like(blind)])[order]
    edge = np.append(np.diff(query) != 0, True)
    edges = FIRST * np.roll(edge, 1) + LAST * edge

    first, end = spans(mask, entries, lengths=lengths, segments=segments, window=window)
    some = first < end
    first, end = jnp.where(some, first, 0), jnp.where(some, end, 0)
    past = ((0, 0), (0, -entries % tile_q))
    first, end, some = (jnp.pad(x, past) for x in (first, end, some))

    def of_step(x, reduce):
        return reduce(x.reshape(len(x), -1, tile_q), axis=2)[:, query]

    lo, hi = key * tile_k, (key + 1) * tile_k
    active = of_step(jnp.where(some, first, mask.clean), jnp.min) < hi
    active &= lo < of_step(end, jnp.max)
    whole = (of_step(first, jnp.max) <= lo) & (hi <= of_step(end, jnp.min))
    stepped = _stepped(mask, entries, tile_q, tile_k, part)[query, key]
    kinds = jnp.where(whole, WHOLE, np.where(stepped, STEPPED, CUT))
    flags = jnp.where(active, kinds, 0) + edges

    # The tile of the last step that reads one: a running maximum, as steps are in order.
    count = -(-mask.clean // tile_k)
    held = lax.cummax(jnp.where(active, np.arange(len(key)) * count + key, 0), axis=1) % count
    return Steps(query, held.astype(jnp.int32), flags.astype(jnp.int32), first, end)


def spans(mask: BlockMask, entries: int, *, lengths=None, segments=None,
          window: int = 0) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The clean keys [first, end) that each query sees, int32 [R, Q]; none where first >= end.

    Documents make a range too: the clean entries of one are side by side.
    """
    index = np.arange(entries)
    clean = index < mask.clean
    behind = seen(mask, entries)[1].astype(np.int32)
    end = jnp.asarray(behind)[None]
    if lengths is not None:
        end = jnp.minimum(end, lengths.astype(jnp.int32)[:, None])
    first = jnp.zeros_like(end)
    if window:
        first = jnp.maximum(jnp.where(clean, index, end) - window + 1, 0)
    if segments is not None:
        own = segments[:, : mask.clean]
        starts = own[:, 1:] != own[:, :-1]
        inner = np.arange(1, mask.clean)
        low = lax.cummax(jnp.where(starts, inner, 0), axis=1)
        high = lax.cummin(jnp.where(starts, inner, mask.clean), axis=1, reverse=True)
        low = jnp.pad(low, ((0, 0), (1, 0)))
        high = jnp.pad(high, ((0, 0), (0, 1)), constant_values=mask.clean)
        if entries > mask.clean:
            noisy = jax.vmap(_document)(own, segments[:, mask.clean :])
            low, high = (jnp.concatenate(x, axis=1) for x in zip((low, high), noisy, strict=True))
        first, end = jnp.maximum(first, low), jnp.minimum(end, high)
    return first.astype(jnp.int32), end.astype(jnp.int32)


def _document(clean, noisy) -> tuple[jax.Array, jax.Array]:
    """The clean entries [first, end) of each noisy entry's document, by its number."""
    order = jnp.argsort(clean, stable=True)
    ranked = clean[order]
    low, high = (jnp.searchsorted(ranked, noisy, side=side) for side in ("left", "right"))
    first = order[jnp.minimum(low, len(clean) - 1)]
    return first, first + high - low


def _stepped(mask: BlockMask, entries: int, tile_q: int, tile_k: int, part: int) -> np.ndarray:
    """Which tiles are STEPPED if nothing else cuts them, bool [query tiles, key tiles]."""
    count = -(-mask.clean // tile_k)
    if tile_q != tile_k or part == tile_k:
        return np.zeros((-(-entries // tile_q), count), bool)
    _, end = seen(mask, entries)
    end = np.pad(end, (0, -entries % tile_q)).reshape(-1, tile_q // part, part).max(axis=2)
    stairs = np.arange(1, tile_q // part + 1) * part
    lo = np.arange(count)[:, None] * tile_k
    return (end[:, None] <= lo + stairs).all(axis=2)
