"""Block attention in plain JAX: the definition, and the implementation wherever XLA runs.

The two-part form: keys of the clean stream with an end per query, and the noisy groups' own small
squares, merged in one softmax. The empty quadrant (clean queries, noisy keys; other groups) is
never computed, so G groups of T cost G * T * T, not (G * T) ** 2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_attention.products import NEG, Scores, einsum
from pallas_kernels.block_attention.quantised import dequantise
from pallas_kernels.masks import BlockMask


class _Read(NamedTuple):
    """Keys and values that a range of queries reads."""

    keys: jax.Array  # [B, K, S, H]
    values: jax.Array  # [B, K, S, H]
    visible: jax.Array  # bool[B or 1, Q, S]


class _Own(NamedTuple):
    """Noisy groups, each of which reads itself."""

    keys: jax.Array  # [B, K, Q, H]
    values: jax.Array  # [B, K, Q, H]
    block: int  # entries of a group
    together: jax.Array | None  # bool[B, Q, block]: of one segment


def block_attention(q, k, v, mask: BlockMask, *, cache=None, cache_end=None, cache_scale=None,
                    chosen=None, hole=None, lengths=None, segments=None, own=True, window=0,
                    scale=None, soft_cap=0.0, piece=0):  # fmt: skip
    """See `pallas_kernels.block_attention`; the output, and the logarithm of each query's sum.

    Args:
      piece: so many clean queries at a time, against the clean keys that one of them may see, which
        under a causal mask are fewer than all; 0: all at once.
      cache: of the layer, [B, K, S, P].
      cache_scale: of the layer, [B, K, 2].
    """
    batch, entries, heads, size = q.shape
    kv_heads, clean = k.shape[2], mask.clean
    q = jnp.moveaxis(q.reshape(batch, entries, kv_heads, heads // kv_heads, size), 1, 3)
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)  # [B, K, Q, H], as the cache has them
    shape = Scores(size**-0.5 if scale is None else scale, soft_cap)

    def reads(lo: int, hi: int) -> list[_Read]:
        index = jnp.arange(lo, hi)
        end = mask.clean_end(index)[None]  # [1 or B, Q]: clean entries that a query may see
        if lengths is not None:
            end = jnp.minimum(end, lengths[:, None])
        place = index[None] if lo < clean else end  # of the query among the clean entries
        most = min(-(-hi // mask.clean_block) * mask.clean_block, clean)  # keys; all, of noisy ones
        found = []
        if cache is not None and cache_end is not None:
            stop = jnp.broadcast_to(cache_end.reshape(batch, -1), (batch, entries))[:, lo:hi]
            if window and hole is None and chosen is None and cache_end.ndim == 1:
                cached, slots = _recent(cache, cache_end, window)
            else:
                cached, slots = cache, jnp.arange(cache.shape[2])[None]
            if cache_scale is not None:
                cached = dequantise(cached, cache_scale)
            cached, half = cached.astype(q.dtype), cache.shape[3] // 2
            slots = slots[:, None]  # [1 or B, 1, S]
            visible = slots < stop[..., None]
            if hole is not None:
                visible &= (slots < hole[0][:, None, None]) | (slots >= hole[1][:, None, None])
            if chosen is not None:
                visible &= jnp.repeat(chosen, cache.shape[2] // chosen.shape[1], axis=1)[:, None]
            if window:
                first = stop if hole is None else hole[0][:, None]  # position of clean entry 0
                visible &= slots > (first + place)[..., None] - window
            # A slot nobody reads may hold anything, and 0 * NaN is NaN: clear its values.
            values = cached[..., half : half + size]
            values = jnp.where(visible.any(axis=1)[:, None, :, None], values, 0)
            found.append(_Read(cached[..., :size], values, visible))
        if clean and own:
            slots = jnp.arange(most)
            visible = slots < end[..., None]
            if window:
                visible = visible & (slots > place[..., None] - window)
            if segments is not None:
                same = segments[:, lo:hi, None] == segments[:, None, :most]
                visible = visible & same
            found.append(_Read(k[:, :, :most], v[:, :, :most], visible))
        return found

    parts = []
    for lo in range(0, clean, piece or max(clean, 1)):
        hi = min(lo + (piece or clean), clean)
        parts.append(_attend(q[:, :, :, lo:hi], shape, reads(lo, hi)))
    if entries > clean:
        groups = None
        if own:
            together = None if segments is None else _same_segment(segments[:, clean:], mask.block)
            groups = _Own(k[:, :, clean:], v[:, :, clean:], mask.block, together)
        parts.append(_attend(q[:, :, :, clean:], shape, reads(clean, entries), groups))
    out, lse = (
        jnp.moveaxis(jnp.concatenate(part, axis=3), 3, 1) for part in zip(*parts, strict=True)
    )
    out = out.reshape(batch, entries, heads, size).astype(q.dtype)
    return out, lse.reshape(batch, entries, heads)


def _recent(cache, cache_end, window: int) -> tuple[jax.Array, jax.Array]:
    """The slots that a window over each row's cache can reach, and their numbers [B, window - 1].

    No query stands before `cache_end`: a sliding layer reads its window, however long the cache.
    """
    width = min(max(window - 1, 1), cache.shape[2])
    start = jnp.clip(cache_end - width, 0, cache.shape[2] - width)
    rows = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, width, axis=1))
    return rows(cache, start), start[:, None] + jnp.arange(width)


def attend_groups(q, k, v, block: int, scores: Scores, segments=None):
    """Each group of `block` entries over itself alone: a part of the two-part form.

    Args:
      q: [B, K, G, Q, H]; k, v: [B, K, Q, H].
      segments: int32[B, Q], of the entries.

    Returns:
      float32 [B, K, G, Q, H], and the logarithm of each query's sum [B, K, G, Q].
    """
    together = None if segments is None else _same_segment(segments, block)
    return _attend(q, scores, [], _Own(k, v, block, together))


def _same_segment(segments, block: int) -> jax.Array:
    """Which entries of its own group are of a query's segment, bool[B, Q, block]."""
    batch, entries = segments.shape
    groups = segments.reshape(batch, entries // block, block)
    return (groups[..., :, None] == groups[..., None, :]).reshape(batch, entries, block)


def _attend(
    q, shape: Scores, reads: list[_Read], own: _Own | None = None
) -> tuple[jax.Array, jax.Array]:
    """One softmax over several sets of keys, float32[B, K, G, Q, H] as `q` is; and its log-sum."""
    scores = [
        jnp.where(r.visible[:, None, None], shape.made(_folded("bkqh,bksh->bkqs", q, r.keys)), NEG)
        for r in reads
    ]
    if own is not None:
        x = shape.made(_own_scores(q, own.keys, own.block))
        scores.append(x if own.together is None else jnp.where(own.together[:, None, None], x, NEG))
    top = jnp.max(jnp.stack([s.max(axis=-1) for s in scores]), axis=0)[..., None]
    top = jax.lax.stop_gradient(top)
    weights = [jnp.where(s > NEG, jnp.exp(shape.times * (s - top)), 0.0) for s in scores]
    total = sum(w.sum(axis=-1, keepdims=True) for w in weights)
    out = jnp.zeros(q.shape, jnp.float32)
    for r, w in zip(reads, weights, strict=False):
        out += _folded("bkqs,bksh->bkqh", w.astype(r.values.dtype), r.values)
    if own is not None:
        out += _own_values(weights[-1], own.values, own.block)
    lse = jnp.where(total > 0, shape.times * top + jnp.log(jnp.maximum(total, 1e-37)), -jnp.inf)
    return out / jnp.where(total > 0, total, 1.0), lse[..., 0]


def _folded(contract: str, x, y) -> jax.Array:
    """The product of [B, K, G, Q, .] and [B, K, S, .], heads and queries of a group as one axis.

    In any other order, or with more axes, XLA transposes keys, values or scores for it on CPUs.
    """
    batch, kv_heads, group, entries, _ = x.shape
    out = einsum(contract, x.reshape(batch, kv_heads, group * entries, -1), y)
    return out.reshape(batch, kv_heads, group, entries, -1)


def _own_scores(q, keys, block: int) -> jax.Array:
    """Scores of each query against its own group, float32[B, K, G, Q, block]."""
    batch, kv_heads, group, entries, size = q.shape
    folded = q.reshape(batch, kv_heads, group, entries // block, block, size)
    scores = einsum("bkgnth,bknsh->bkgnts", folded, _groups(keys, block))
    return scores.reshape(batch, kv_heads, group, entries, block)


def _own_values(weights, values, block: int) -> jax.Array:
    """Values of each query's own group, weighed, float32[B, K, G, Q, H]."""
    batch, kv_heads, group, entries, _ = weights.shape
    folded = weights.reshape(batch, kv_heads, group, entries // block, block, block)
    folded = folded.astype(values.dtype)
    mixed = einsum("bkgnts,bknsh->bkgnth", folded, _groups(values, block))
    return mixed.reshape(batch, kv_heads, group, entries, values.shape[-1])


def _groups(x, block: int) -> jax.Array:
    """[B, K, Q, H] as [B, K, groups, block, H]."""
    return x.reshape(*x.shape[:2], x.shape[2] // block, block, x.shape[3])
