"""Attention of many queries over many keys in plain JAX: tile by tile, forward and backward.

Where the scores of a pass do not fit in memory, or should not travel through it. Each query sees an
interval of keys, so each tile of queries reads the tiles between two ends: those that nobody sees
are skipped, and only those that an end cuts are masked. The backward pass makes the scores again
from the logarithm of each query's sum (FlashAttention-2: Dao 2023, arXiv 2307.08691).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_attention.products import NEG, Scores, einsum

TILE = 512  # queries, and keys


class Seen(NamedTuple):
    """The keys that each query sees: [start, end), less a hole, of pieces that are chosen."""

    start: jax.Array  # int32[B or 1, Q]
    end: jax.Array  # int32[B or 1, Q]
    hole: jax.Array | None = None  # int32[B, 2]: keys [first, second) are seen by nobody
    chosen: jax.Array | None = None  # bool[B, M]: which of M equal pieces of the keys are seen


class Static(NamedTuple):
    """What is part of the program."""

    scores: Scores
    tile: int = TILE


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(static: Static, q, kv, layer, seen: Seen) -> tuple[jax.Array, jax.Array]:
    """Attention over keys, in tiles.

    Args:
      q: [B, K, G, Q, H], the G query heads of each kv head.
      kv: keys and values, packed in the last axis, [B, K, S, P], or [Ly, B, K, S, P] of all layers,
        of which `layer` is meant. Read in place. What nobody sees may be anything.
      layer: its number, or None.

    Returns:
      float32 [B, K, G, Q, H], and the logarithm of each query's sum [B, K, G, Q]: zeros and -inf
      where nothing is seen. Both have gradients, to `q` and `kv`.
    """
    return forward(static, q, kv, layer, seen)[0]


def forward(static: Static, q, kv, layer, seen: Seen):
    plan = _Plan(static, q, kv, layer, seen)

    def tile(i):
        queries = plan.tiles[i]

        def step(kind, j, state):
            top, total, mixed = state
            keys, values, visible = plan.read(i, j, kind)
            x = static.scores.made(einsum("bkqh,bksh->bkqs", queries, keys))
            if visible is not None:
                x = jnp.where(visible, x, NEG)
            most = jnp.maximum(top, x.max(axis=-1))
            weights = jnp.exp(static.scores.times * (x - most[..., None]))
            shrink = jnp.exp(static.scores.times * (top - most))
            total = total * shrink + weights.sum(axis=-1)
            added = einsum("bkqs,bksh->bkqh", weights.astype(values.dtype), values)
            return most, total, mixed * shrink[..., None] + added

        shape = queries.shape[:-1]
        empty = jnp.full(shape, NEG), jnp.zeros(shape), jnp.zeros(queries.shape, jnp.float32)
        top, total, mixed = plan.over_keys(i, step, empty)
        # A masked score counts nothing once anything was seen: the larger maximum takes it to zero.
        none = top <= NEG
        total = jnp.where(none, 1.0, total)
        lse = jnp.where(none, -jnp.inf, static.scores.times * top + jnp.log(total))
        return jnp.where(none[..., None], 0.0, mixed / total[..., None]), lse

    out, lse = lax.map(tile, jnp.arange(plan.count))
    out, lse = plan.joined(out), plan.joined(lse[..., None])[..., 0]
    return (out, lse), (q, kv, layer, seen, out, lse)


def backward(static: Static, saved, grads):
    """Gradients of `attend`, from (its arguments, its results) and the gradients of these."""
    q, kv, layer, seen, out, lse = saved
    plan = _Plan(static, q, kv, layer, seen)
    d_out, d_lse = grads
    # The slope of a score is its weight times (its own slope less this).
    level = (out * d_out).sum(axis=-1) - jnp.where(lse > -jnp.inf, d_lse, 0.0)
    d_out = plan.cut(d_out.astype(q.dtype))
    level, lse = (plan.cut(x[..., None])[..., 0] for x in (level, jnp.where(lse > NEG, lse, 0.0)))
    scale = static.scores.scale

    def tile(i, carry):
        d_kv, d_q = carry
        queries, own, log_sum, base = plan.tiles[i], d_out[i], lse[i], level[i]

        def step(kind, j, state):
            d_queries, d_kv = state
            keys, values, visible = plan.read(i, j, kind)
            x = static.scores.made(einsum("bkqh,bksh->bkqs", queries, keys))
            share = jnp.exp(static.scores.times * x - log_sum[..., None])
            if visible is not None:
                share = jnp.where(visible, share, 0.0)
            slope = einsum("bkqh,bksh->bkqs", own, values) - base[..., None]
            slope = static.scores.slope(share * slope, x).astype(q.dtype)
            d_keys = einsum("bkqs,bkqh->bksh", slope, queries) * scale
            d_values = einsum("bkqs,bkqh->bksh", share.astype(q.dtype), own)
            d_queries += einsum("bkqs,bksh->bkqh", slope, keys)
            return d_queries, plan.added(d_kv, j, d_keys, d_values)

        zeros = jnp.zeros(queries.shape, jnp.float32)
        d_queries, d_kv = plan.over_keys(i, step, (zeros, d_kv))
        return d_kv, lax.dynamic_update_index_in_dim(d_q, (d_queries * scale).astype(q.dtype), i, 0)

    batch, kv_heads, slots, width = kv.shape[-4:]
    d_kv = jnp.zeros((batch, kv_heads, slots, width), jnp.float32)
    d_q = jnp.zeros((plan.count, *plan.tiles.shape[1:]), q.dtype)
    d_kv, d_q = lax.fori_loop(0, plan.count, tile, (d_kv, d_q))
    if not jnp.issubdtype(kv.dtype, jnp.floating):
        d_kv = None
    elif layer is not None:
        zeros = jnp.zeros_like(kv)
        d_kv = lax.dynamic_update_index_in_dim(zeros, d_kv.astype(kv.dtype), layer, 0)
    else:
        d_kv = d_kv.astype(kv.dtype)
    return plan.joined(d_q), d_kv, None, jax.tree.map(lambda _: None, seen)


attend.defvjp(forward, backward)


class _Plan:
    """Which tiles meet, and how they are cut out of the arrays."""

    def __init__(self, static: Static, q, kv, layer, seen: Seen):
        self.kv, self.layer, self.seen = kv, layer, seen
        self.shape = q.shape
        self.slots = kv.shape[-2]
        self.rows = min(static.tile, q.shape[3])
        self.width = min(static.tile, self.slots)
        self.count = -(-q.shape[3] // self.rows)
        self.tiles = self.cut(q)
        pad = self.count * self.rows - q.shape[3]
        end = lambda x, value: jnp.pad(x, ((0, 0), (0, pad)), constant_values=value)  # noqa: E731
        fold = lambda x: x.reshape(len(x), self.count, self.rows)  # noqa: E731
        self.start, self.end = fold(end(seen.start, self.slots)), fold(end(seen.end, 0))
        self.chosen = None  # bool[B, S]
        if seen.chosen is not None:
            pieces = seen.chosen.shape[1]
            self.chosen = jnp.repeat(seen.chosen, self.slots // pieces, axis=1)
        self.kinds = self._kinds()  # int32[tiles of queries, tiles of keys]: 0 skipped, 1 cut
        there = self.kinds > 0
        self.first = jnp.argmax(there, axis=1).astype(jnp.int32)
        last = there.shape[1] - jnp.argmax(there[:, ::-1], axis=1)
        self.last = jnp.where(there.any(axis=1), last, self.first).astype(jnp.int32)

    def cut(self, x):
        """[B, K, G, Q, H] as [tiles, B, K, G * rows, H]."""
        batch, kv_heads, group, entries, size = x.shape
        pad = self.count * self.rows - entries
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, pad), (0, 0)))
        x = x.reshape(batch, kv_heads, group, self.count, self.rows, size)
        return jnp.moveaxis(x, 3, 0).reshape(self.count, batch, kv_heads, -1, size)

    def joined(self, x):
        """The way back."""
        batch, kv_heads, group, entries, _ = self.shape
        x = x.reshape(self.count, batch, kv_heads, group, self.rows, -1)
        x = jnp.moveaxis(x, 0, 3).reshape(batch, kv_heads, group, -1, x.shape[-1])
        return x[:, :, :, :entries]

    def _kinds(self):
        low = jnp.arange(-(-self.slots // self.width)) * self.width  # of each tile of keys
        high = jnp.minimum(low + self.width, self.slots)
        of = lambda x, how: how(x, axis=2)[:, :, None]  # noqa: E731
        some = (of(self.start, jnp.min) < high) & (of(self.end, jnp.max) > low)
        every = (of(self.start, jnp.max) <= low) & (of(self.end, jnp.min) >= high)
        if self.seen.hole is not None:
            first, second = (x[:, None, None] for x in self.seen.hole.T)
            some &= ~((first <= low) & (high <= second))
            every &= (first >= second) | (second <= low) | (high <= first)
        if self.chosen is not None:
            pad = len(low) * self.width - self.slots
            chosen = jnp.pad(self.chosen, ((0, 0), (0, pad)), mode="edge")
            chosen = chosen.reshape(len(chosen), 1, len(low), self.width)
            some, every = some & chosen.any(axis=3), every & chosen.all(axis=3)
        every &= low + self.width <= self.slots  # the last one may repeat keys
        return jnp.where(every.all(axis=0), 2, jnp.where(some.any(axis=0), 1, 0))

    def over_keys(self, i, step, state):
        """`step(kind, j, state)` for each tile of keys that tile i of the queries reads."""

        def one(j, state):
            return lax.switch(
                self.kinds[i, j],
                [lambda j, s: s, partial(step, 1), partial(step, 2)],
                j, state,
            )  # fmt: skip

        return lax.fori_loop(self.first[i], self.last[i], one, state)

    def read(self, i, j, kind: int):
        """Keys, values, and who sees them: all (None), or bool[B or 1, 1, G * rows, width]."""
        start = self._at(j)
        kv = lax.dynamic_slice(self.kv, self._index(start), self._window())
        kv = kv.reshape(kv.shape[-4:]).astype(self.tiles.dtype)
        size, half = self.shape[-1], kv.shape[-1] // 2
        keys, values = kv[..., :size], kv[..., half : half + size]
        if kind == 2:
            return keys, values, None
        slots = start + jnp.arange(self.width)
        low, high = self.start[:, i, :, None], self.end[:, i, :, None]
        visible = (slots >= low) & (slots < high) & (slots >= j * self.width)
        if self.seen.hole is not None:
            first, second = (x[:, None, None] for x in self.seen.hole.T)
            visible &= (slots < first) | (slots >= second)
        if self.chosen is not None:
            own = lax.dynamic_slice_in_dim(self.chosen, start, self.width, axis=1)
            visible &= own[:, None]
        # What nobody sees may be anything, and 0 * NaN is NaN.
        values = jnp.where(visible.any(axis=1)[:, None, :, None], values, 0)
        keys = jnp.where(visible.any(axis=1)[:, None, :, None], keys, 0)
        group = self.shape[2]
        return keys, values, jnp.tile(visible, (1, group, 1))[:, None]

    def added(self, d_kv, j, d_keys, d_values):
        """The gradient of keys and values with that of tile j added."""
        index = (0, 0, self._at(j), 0)
        rest = ((0, 0),) * 3 + ((0, d_kv.shape[-1] // 2 - d_keys.shape[-1]),)
        own = jnp.concatenate([jnp.pad(x, rest) for x in (d_keys, d_values)], axis=-1)
        before = lax.dynamic_slice(d_kv, index, own.shape)
        return lax.dynamic_update_slice(d_kv, before + own, index)

    def _at(self, j):
        return jnp.minimum(j * self.width, self.slots - self.width)

    def _index(self, start):
        index = (0, 0, start, 0)
        return index if self.layer is None else (self.layer, *index)

    def _window(self):
        batch, kv_heads, _, width = self.kv.shape[-4:]
        shape = (batch, kv_heads, self.width, width)
        return shape if self.layer is None else (1, *shape)
