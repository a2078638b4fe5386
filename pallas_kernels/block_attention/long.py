"""Long passes, prefill and training: attention in parts, none of which forms all its scores.

Part one is over the clean entries, to which each query has an end; part two over the cache, the
same; part three the noisy groups' own small squares. They merge by the logarithms of their sums.
"""

import jax.numpy as jnp

from pallas_kernels.block_attention import flash_xla, reference
from pallas_kernels.block_attention.products import Scores, merged
from pallas_kernels.block_attention.worklist import place
from pallas_kernels.masks import BlockMask


def block_attention(q, k, v, mask: BlockMask, *, cache=None, layer=None, cache_end=None, hole=None,
                    lengths=None, segments=None, window=0, scale=None, soft_cap=0.0,
                    over_clean=None, tile=flash_xla.TILE):  # fmt: skip
    """See `pallas_kernels.block_attention`; the output, and the logarithm of each query's sum.

    Args:
      over_clean: part one: a kernel with the arguments and results of `over_clean` below.
      tile: of queries, and of keys.
    """
    batch, entries, heads, size = q.shape
    kv_heads, clean = k.shape[2], mask.clean
    scores = Scores(size**-0.5 if scale is None else scale, soft_cap)
    grouped = jnp.moveaxis(q.reshape(batch, entries, kv_heads, heads // kv_heads, size), 1, 3)
    static = flash_xla.Static(scores, tile)
    parts = []
    if clean:
        options = {"lengths": lengths, "segments": segments, "window": window}
        if over_clean is None:
            found = _over_clean(static, grouped, k[:, :clean], v[:, :clean], mask, **options)
        else:
            out, lse = over_clean(
                q, k[:, :clean], v[:, :clean], mask, scale=scores.scale, soft_cap=soft_cap,
                **options,
            )  # fmt: skip
            found = _grouped(out, kv_heads), _grouped(lse[..., None], kv_heads)[..., 0]
        parts.append(found)
    if cache is not None and cache_end is not None:
        seen = _of_cache(mask, entries, cache_end, hole, lengths, window)
        parts.append(flash_xla.attend(static, grouped, cache, layer, seen))
    if entries > clean:
        k, v = (jnp.moveaxis(x[:, clean:], 1, 2) for x in (k, v))
        out, lse = reference.attend_groups(
            grouped[:, :, :, clean:], k, v, mask.block, scores,
            None if segments is None else segments[:, clean:],
        )  # fmt: skip
        before = ((0, 0),) * 3 + ((clean, 0),)
        parts.append((
            jnp.pad(out, (*before, (0, 0))), jnp.pad(lse, before, constant_values=-jnp.inf)
        ))  # fmt: skip
    out, lse = merged(parts)
    out = jnp.moveaxis(out, 3, 1).reshape(batch, entries, heads, size).astype(q.dtype)
    return out, jnp.moveaxis(lse, 3, 1).reshape(batch, entries, heads)


def _over_clean(static, grouped, k, v, mask: BlockMask, *, lengths, segments, window):
    index = jnp.arange(grouped.shape[3])
    valid = jnp.full((1,), mask.clean) if lengths is None else lengths
    end = jnp.minimum(mask.clean_end(index), valid[:, None])
    start = jnp.zeros_like(end)
    if window:
        start = jnp.maximum(place(mask, index, valid[:, None]) - window + 1, 0)
    keys = None if segments is None else segments[:, : mask.clean]
    seen = flash_xla.Seen(start, end, queries=segments, keys=keys)
    kv = jnp.moveaxis(jnp.concatenate([k, v], axis=-1), 1, 2)
    return flash_xla.attend(static, grouped, kv, None, seen)


def _of_cache(mask: BlockMask, entries: int, cache_end, hole, lengths, window) -> flash_xla.Seen:
    batch = len(cache_end)
    end = jnp.broadcast_to(cache_end.reshape(batch, -1), (batch, entries))
    start = jnp.zeros_like(end)
    if window:
        valid = jnp.full((batch,), mask.clean) if lengths is None else lengths
        first = end if hole is None else hole[0][:, None]  # position of clean entry 0
        stands = first + place(mask, jnp.arange(entries), valid[:, None])
        start = jnp.maximum(stands - window + 1, 0)
    return flash_xla.Seen(start, end, None if hole is None else jnp.stack(hole, axis=1))


def _grouped(x, kv_heads: int):
    """[B, Q, N, X] as [B, K, G, Q, X]."""
    batch, entries, heads, width = x.shape
    return jnp.moveaxis(x.reshape(batch, entries, kv_heads, heads // kv_heads, width), 1, 3)
