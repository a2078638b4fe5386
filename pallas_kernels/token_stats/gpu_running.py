"""What a warpgroup knows of its 64 rows, and how a tile's scores come into it, in registers.

In pieces of `PIECE` tokens: numbers in the making need registers, of which scores take many. Arrays
are of the layouts of wgmma's results: [64, t] scores, [64] a number of each row.
"""

from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.token_stats.noise import random_bits
from pallas_kernels.token_stats.partial import LOWEST

ROWS = 64  # of a warpgroup: those of one wgmma
PIECE = 8  # tokens
BEHIND = 0x7FFFFFFF  # an id behind all others
PER_ROW, PER_TOKEN = (plgpu.Layout.WGMMA.reduce(axis) for axis in (1, 0))


class Sample(NamedTuple):
    """Of a sample, float32[64] each."""

    total: jax.Array  # of the scores over the temperature
    spread: jax.Array
    value: jax.Array  # of the winner of the race
    id: jax.Array  # int32[64]
    score: jax.Array


class Running(NamedTuple):
    """What a warpgroup knows of its 64 rows so far, float32[64] each. The largest is `best[0]`."""

    best: tuple[jax.Array, ...]  # in order
    ids: tuple[jax.Array, ...]  # int32[64]
    total: jax.Array
    spread: jax.Array
    sample: Sample | None = None


def nothing(top: int, drawn: bool) -> Running:
    """Of no token."""
    zero, lowest = (_full((ROWS,), x, PER_ROW) for x in (0.0, LOWEST))
    none = _full((ROWS,), 0, PER_ROW)
    sample = Sample(zero, zero, lowest, none, lowest) if drawn else None
    return Running((lowest,) * top, (none,) * top, zero, zero, sample)


def _full(shape, value: float | int, layout):
    dtype = jnp.int32 if isinstance(value, int) else jnp.float32
    return plgpu.layout_cast(jnp.full(shape, value, dtype), layout)


def wide(x, like, axis=0):
    """Numbers of rows (or of tokens, axis 1), at each score."""
    return jax.lax.broadcast_in_dim(x, like.shape, [axis])


def iota(shape):
    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)


def added(running: Running, pieces) -> Running:
    """The best and the sums with a tile's pieces, scores float32[64, t] and ids int32[64, t]."""
    best, best_ids, left = running.best, running.ids, pieces
    for rank in range(len(best)):
        value = reduce(jnp.maximum, (scores for scores, _ in left)).max(axis=1)
        winner = reduce(jnp.minimum, (_where(x, value, ids) for x, ids in left)).min(axis=1)
        best, best_ids = _inserted(best, best_ids, value, winner)
        if rank + 1 < len(best):
            left = [(jnp.where(ids == wide(winner, ids), LOWEST, x), ids) for x, ids in left]
    total, spread = 0.0, 0.0
    for scores, _ in pieces:
        below = scores - wide(best[0], scores)
        weights = jnp.exp(below)
        total, spread = total + weights, spread + weights * below
    before = running.best[0], running.total, running.spread
    total, spread = _summed(before, best[0], total, spread)
    return Running(best, best_ids, total, spread, running.sample)


def drawn(sample: Sample, before, top, scores_ref, first, of_rows) -> Sample:
    """With a tile's scores, in pieces [64, t] in memory, the ids of which start with `first`.

    A loop, in which the noise of a piece is made at a time: that of a tile would be more than ten
    thousand instructions. The largest score was `before` and is now `top`.
    """
    cool, *keys = (of_rows(name) for name in ("cool", "key0", "key1"))
    before, top = warmed(before, cool), warmed(top, cool)

    def add(j, so_far):
        total, spread, *best = so_far
        scores = plgpu.layout_cast(scores_ref[j], plgpu.Layout.WGMMA)
        ids = first + j * PIECE + iota(scores.shape)
        warm = warmed(scores, wide(cool, scores))
        below = warm - wide(top, warm)
        weights = jnp.exp(below)
        key0, key1 = (wide(key, ids) for key in keys)
        values = warm + gumbel(random_bits(key0, key1, ids.astype(jnp.uint32)))
        later = values > best[0]
        best = (jnp.where(later, x, y) for x, y in zip((values, ids, scores), best, strict=True))
        return total + weights, spread + weights * below, *best

    start = (
        _full((ROWS, PIECE), x, plgpu.Layout.WGMMA) for x in (0.0, 0.0, LOWEST, BEHIND, LOWEST)
    )
    total, spread, values, ids, scores = jax.lax.fori_loop(
        0, scores_ref.shape[0], add, tuple(start)
    )
    total, spread = _summed((before, sample.total, sample.spread), top, total, spread)
    value = values.max(axis=1)
    winner = _where(values, value, ids).min(axis=1)
    score = jnp.where(ids == wide(winner, ids), scores, LOWEST).max(axis=1)
    later = value > sample.value
    pairs = (value, sample.value), (winner, sample.id), (score, sample.score)
    return Sample(total, spread, *(jnp.where(later, x, y) for x, y in pairs))


def _where(values, largest, ids):
    """The ids whose value is the largest of its row; elsewhere one behind all."""
    return jnp.where(values == wide(largest, values), ids, jnp.int32(BEHIND))


def _inserted(best, ids, value, winner):
    """The lists in order, with a newcomer behind its equals, without their last."""
    out = []
    for number, one in zip(best, ids, strict=True):
        ahead = value > number
        out.append((jnp.where(ahead, value, number), jnp.where(ahead, winner, one)))
        value, winner = jnp.where(ahead, number, value), jnp.where(ahead, one, winner)
    return tuple(zip(*out, strict=True))


def warmed(scores, cool):
    """Over the temperature; what is barred stays finite."""
    return jnp.maximum(scores * cool, LOWEST)


def _summed(before, top, total, spread):
    """Mass `before` (largest, total, spread) with a tile's [64, t], for `top`, the new largest."""
    shift = before[0] - top
    keep = jnp.exp(shift)
    total = keep * before[1] + total.sum(axis=1)
    spread = keep * (before[2] + shift * before[1]) + spread.sum(axis=1)
    some = top > LOWEST  # else every token is barred
    return jnp.where(some, total, 0.0), jnp.where(some, spread, 0.0)


def gumbel(bits):
    """As `noise.gumbel_of`, with one logarithm less, and without log1p, which does not lower.

    For the share near one, log(1 - share) is that of the rounded difference plus what was rounded
    off, exact to the last digits of either.
    """
    whole = (bits >> jnp.uint32(1)).astype(jnp.int32)
    low = whole < (1 << 30)
    near = jnp.where(low, whole, jnp.int32(BEHIND) - whole).astype(jnp.float32)
    share = (near + 0.5) * jnp.float32(2.0**-31)
    rest = 1.0 - share
    lost = (1.0 - rest) - share
    return -jnp.log(-(jnp.log(jnp.where(low, share, rest)) + jnp.where(low, 0.0, lost)))
