"""Which tiles each program of the GPU kernel reads, and which of them it masks.

stretch 0   share 0: cache 0, 1, 2   share 1: cache 3 (cut), 7 (cut), own 0 (cut)     tiles 4 to 6
stretch 1   share 0: cache 0, 1, 2   share 1: cache 3 (cut), 7 (cut), own 0 (cut)     are a hole
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.block_attention import worklist
from pallas_kernels.masks import BlockMask

_FAR = 1 << 30  # behind every key
_BESIDE = 2  # what a program costs beside its tiles, in tiles: a guess

# Which keys a tile is of, and its place in the numbers of a program.
CACHED, OWN = 0, 1
UNTIL, SHIFT, READ, WHOLE = 0, 4, 8, 16


def edges(mask: BlockMask, entries: int, slots: int, *, cache_end, hole, lengths, window: int):
    """What each entry reads: keys in [first, second) or [third, fourth).

    Returns:
      int32[B, 2, 4, Q]: of the cache, and of the entries' own keys.
    """
    base = cache_end if hole is None else hole[0]  # the slot of clean entry 0
    none = jnp.zeros_like(cache_end)
    first, second = (none, none) if hole is None else hole
    valid = jnp.full_like(none, mask.clean) if lengths is None else lengths
    base, first, second, valid, end = (
        x[:, None] for x in (base, first, second, valid, jnp.minimum(cache_end, slots))
    )
    second = jnp.maximum(first, second)
    index = jnp.arange(entries)[None]
    noisy = index >= mask.clean
    begin = mask.clean + mask.group(index) * mask.block
    low = jnp.full_like(index, 0)
    start = low
    if window:
        low = worklist.place(mask, index, valid) - window + 1
        start = jnp.maximum(base + low, 0)
    cached = start, jnp.minimum(first, end), jnp.maximum(second, start), end
    own = (
        jnp.maximum(low, 0), jnp.minimum(mask.clean_end(index), valid),
        jnp.where(noisy, begin, 0), jnp.where(noisy, begin + mask.block, 0),
    )  # fmt: skip
    shape = cache_end.shape[0], entries
    kinds = [
        jnp.stack([jnp.broadcast_to(x, shape) for x in kind], axis=1) for kind in (cached, own)
    ]
    return jnp.stack(kinds, axis=1).astype(jnp.int32)


def numbers(edges, rows: int, tile: int) -> jax.Array:
    """What a program goes by, int32[B, stretches, 24].

    Its tiles are four runs: of the cache, up to a hole and behind it; of the entries, clean ones
    and noisy ones. Step t is of the first run whose `UNTIL` is above t, and its tile is t plus the
    run's `SHIFT`. `READ` and `WHOLE` are two intervals of each kind of keys: those that some
    query reads, and those that all do.
    """
    edges = edges.reshape(*edges.shape[:3], -1, rows)
    low, high = edges[:, :, 0::2], edges[:, :, 1::2]  # [B, 2, 2, stretches, rows]
    some = low < high
    first = jnp.where(some, low, _FAR).min(axis=4)
    last = jnp.where(some, high, 0).max(axis=4)
    begin, end = first // tile, -(-last // tile)
    # A hole may begin and end in one tile, which is read once.
    begin = begin.at[:, :, 1].max(end[:, :, 0])
    count = jnp.maximum(end - begin, 0)

    def flat(x):
        return jnp.moveaxis(x.reshape(x.shape[0], -1, edges.shape[3]), 2, 1)

    begin, count = flat(begin), flat(count)
    until = jnp.cumsum(count, axis=2)

    def intervals(low, high):
        return flat(jnp.stack([low, high], axis=3))

    read = intervals(first, last)
    whole = intervals(low.max(axis=4), high.min(axis=4))
    parts = until, begin - (until - count), read, whole
    return jnp.concatenate(parts, axis=2).astype(jnp.int32)


def inside(low, high, intervals):
    """Whether [low, high) is in one of two intervals."""
    a, b, c, d = intervals
    return ((low >= a) & (high <= b)) | ((low >= c) & (high <= d))


def splits(programs: int, places: int, tiles: int, *, uneven: bool) -> int:
    """The fewest shares of `tiles` that keep the chip's places about as busy as any number of them.

    A share has eight tiles or more: what it writes is about a tile, and is read again. Rows that
    are unequally long want several shares for each place, or the longest row is waited for.
    """

    def busy(number: int) -> float:
        waves, tiles_each = programs * number / places, tiles / number
        full = waves / (math.ceil(waves) + uneven / 2)
        return full * tiles_each / (tiles_each + _BESIDE)

    numbers = range(1, max(tiles // 8, 1) + 1)
    best = max(map(busy, numbers))
    return next(n for n in numbers if busy(n) >= 0.95 * best)
