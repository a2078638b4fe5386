"""Long passes, prefill and training: attention in parts, none of which forms all its scores.

Part one is over the clean entries, to which each query has an end; part two over the cache, the
same; part three the noisy groups' own small squares. They merge by the logarithms of their sums.
The first two are kernels on a TPU.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.block_attention import (
    flash_steps,
    flash_tpu,
    flash_xla,
    reference,
    tpu,
    worklist,
)
from pallas_kernels.block_attention.products import Scores, merged
from pallas_kernels.masks import BlockMask


def block_attention(q, k, v, mask: BlockMask, *, cache=None, layer=None, cache_end=None,
                    cache_scale=None, chosen=None, hole=None, lengths=None, segments=None,
                    own=True, window=0, scale=None, soft_cap=0.0, kernels=False,
                    tile=flash_xla.TILE):  # fmt: skip
    """See `pallas_kernels.block_attention`; the output, and the logarithm of each query's sum.

    Args:
      kernels: whether parts one and two are TPU kernels.
      tile: of queries, and of keys, in XLA.
    """
    entries, size, kv_heads, clean = q.shape[1], q.shape[3], k.shape[2], mask.clean
    static = flash_xla.Static(Scores(size**-0.5 if scale is None else scale, soft_cap), tile)
    grouped = _grouped(q, kv_heads)
    parts = []
    if clean and own:
        options = {"lengths": lengths, "segments": segments}
        over = partial(_clean_tpu if kernels else _clean, static, mask, window)
        parts.append(over(grouped, k[:, :clean], v[:, :clean], options))
    if cache is not None:
        options = {"cache_end": cache_end, "hole": hole, "lengths": lengths, "chosen": chosen}
        options["layer"] = layer
        over = partial(_cached_tpu if kernels else _cached, static, mask, window)
        parts.append(over(grouped, cache, cache_scale, options))
    if entries > clean and own:
        k, v = (jnp.moveaxis(x[:, clean:], 1, 2) for x in (k, v))
        out, lse = reference.attend_groups(
            grouped[:, :, :, clean:], k, v, mask.block, static.scores,
            None if segments is None else segments[:, clean:],
        )  # fmt: skip
        before = ((0, 0),) * 3 + ((clean, 0),)
        parts.append((
            jnp.pad(out, (*before, (0, 0))), jnp.pad(lse, before, constant_values=-jnp.inf)
        ))  # fmt: skip
    out, lse = merged(parts)
    return _entries(out).astype(q.dtype), _by_entry(lse)


def takes(q, k, mask: BlockMask, *, cache=None, cache_end=None, chosen=None, own=True):
    """Why the TPU kernels cannot run a call, in a line, or None if they can."""
    reason = None if cache is not None else "there are neither clean entries nor a cache"
    if mask.clean and own:
        reason = flash_tpu.takes(q, k, mask)
    if cache is not None and reason is None:
        reason = tpu.takes(q, k, mask, cache=cache, cache_end=cache_end, chosen=chosen, own=False)
    return reason


def _clean(static, mask: BlockMask, window: int, q, k, v, options):
    """Part one, in XLA: [B, K, G, Q, H] and [B, K, G, Q], float32."""
    return flash_xla.attend(static, q, _pair(k, v), None, _seen_clean(mask, window, q, options))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _clean_tpu(static, mask: BlockMask, window: int, q, k, v, options):
    return _clean_forward(static, mask, window, q, k, v, options)[0]


def _clean_forward(static, mask: BlockMask, window: int, q, k, v, options):
    out, lse = flash_tpu.over_clean(
        _entries(q), k, v, mask, **static.scores._asdict(), window=window, **options
    )
    found = _grouped(out, k.shape[2]).astype(jnp.float32), _by_head(lse, k.shape[2])
    return found, (q, k, v, options, out, lse)


def _clean_backward(static, mask: BlockMask, window: int, saved, grads):
    q, k, v, options, out, lse = saved
    if flash_tpu.takes(_entries(q), k, mask, gradient=True) is None:
        d_out, d_lse = _entries(grads[0]), _by_entry(grads[1])
        d_q, d_k, d_v = flash_tpu.over_clean_backward(
            _entries(q), k, v, out, lse, d_out, d_lse, mask, **static.scores._asdict(),
            window=window, **options,
        )  # fmt: skip
        return _grouped(d_q, k.shape[2]), d_k, d_v, _none(options)
    d_q, d_k, d_v = jax.vjp(
        lambda q, k, v: _clean(static, mask, window, q, k, v, options), q, k, v
    )[1](grads)
    return d_q, d_k, d_v, _none(options)


_clean_tpu.defvjp(_clean_forward, _clean_backward)


def _seen_clean(mask: BlockMask, window: int, q, options) -> flash_xla.Seen:
    return flash_xla.Seen(*flash_steps.spans(mask, q.shape[3], window=window, **options))


def _cached(static, mask: BlockMask, window: int, q, cache, scale, options):
    """Part two, in XLA. The scales of an int8 cache are those of queries and of results."""
    seen = _seen_cached(mask, window, q, options)
    layer = options["layer"]
    if scale is None:
        return flash_xla.attend(static, q, cache, layer, seen)
    if layer is not None:
        scale = jax.lax.dynamic_index_in_dim(scale, layer, keepdims=False)
    keys, values = (scale[..., i, None, None, None] for i in range(2))
    out, lse = flash_xla.attend(static, (q * keys).astype(q.dtype), cache, layer, seen)
    return out * values, lse


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _cached_tpu(static, mask: BlockMask, window: int, q, cache, scale, options):
    found = dict(options)
    if found["layer"] is None:
        found["layer"] = jnp.int32(0)
        cache, scale = jax.tree.map(lambda x: x[None], (cache, scale))
    queries = _entries(q)
    none = queries[:, :, : q.shape[1]]  # keys and values of the entries, which are not read
    out, lse = tpu.block_attention(
        queries, none, none, mask, cache=cache, cache_scale=scale, own=False, window=window,
        **static.scores._asdict(), **found,
    )  # fmt: skip
    return _grouped(out, q.shape[1]).astype(jnp.float32), _by_head(lse, q.shape[1])


def _cached_forward(static, mask: BlockMask, window: int, *arrays):
    return _cached_tpu(static, mask, window, *arrays), arrays


def _cached_backward(static, mask: BlockMask, window: int, saved, grads):
    q, cache, scale, options = saved
    if scale is None:
        run = lambda q, cache: _cached(static, mask, window, q, cache, None, options)  # noqa: E731
        d_q, d_cache = jax.vjp(run, q, cache)[1](grads)
        return d_q, d_cache, None, _none(options)
    run = lambda q, scale: _cached(static, mask, window, q, cache, scale, options)  # noqa: E731
    d_q, d_scale = jax.vjp(run, q, scale)[1](grads)
    return d_q, None, d_scale, _none(options)


_cached_tpu.defvjp(_cached_forward, _cached_backward)


def _seen_cached(mask: BlockMask, window: int, q, options) -> flash_xla.Seen:
    reach = worklist.reach(
        mask, q.shape[3], window=window,
        **{name: options[name] for name in ("cache_end", "hole", "lengths")},
    )  # fmt: skip
    start, end = (jnp.broadcast_to(x, (len(q), q.shape[3])) for x in reach)
    hole = options["hole"]
    return flash_xla.Seen(
        start, end, None if hole is None else jnp.stack(hole, axis=1), chosen=options["chosen"]
    )


def _pair(k, v):
    """Keys and values [B, S, K, H] as a cache has them."""
    return jnp.moveaxis(jnp.concatenate([k, v], axis=-1), 1, 2)


def _grouped(x, kv_heads: int):
    """[B, Q, N, X] as [B, K, G, Q, X]."""
    batch, entries, heads, width = x.shape
    return jnp.moveaxis(x.reshape(batch, entries, kv_heads, heads // kv_heads, width), 1, 3)


def _entries(x):
    """[B, K, G, Q, X] as [B, Q, N, X]."""
    batch, kv_heads, group, entries, width = x.shape
    return jnp.moveaxis(x, 3, 1).reshape(batch, entries, kv_heads * group, width)


def _by_head(x, kv_heads: int):
    """[B, Q, N] as [B, K, G, Q]."""
    return _grouped(x[..., None], kv_heads)[..., 0]


def _by_entry(x):
    """[B, K, G, Q] as [B, Q, N]."""
    return _entries(x[..., None])[..., 0]


def _none(options):
    """Gradients of what has none."""
    return jax.tree.map(lambda _: None, options)
