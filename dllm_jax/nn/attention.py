"""Attention of the entries of a pass over a cache and over themselves, for every module here."""

from typing import Any

import jax
from jaxtyping import Array, Float, Int

from dllm_jax.cache import KVCache
from dllm_jax.ops.attention import attention
from pallas_kernels import BlockMask, block_attention_lse
from pallas_kernels.block_attention.products import merged


def attend(
    q: Float[Array, "B Q N H"],
    k: Float[Array, "B Q K H"],
    v: Float[Array, "B Q K H"],
    mask: BlockMask,
    *,
    cache: KVCache | None,
    layer: Int[Array, ""],
    part: int | None = None,
    cache_end: Int[Array, "B"] | Int[Array, "B Q"] | None = None,
    hole: tuple[Int[Array, "B"], Int[Array, "B"]] | None = None,
    lengths: Int[Array, "B"] | None = None,
    segments: Int[Array, "B Q"] | None = None,
    **options: Any,
) -> Float[Array, "B Q N H"]:
    """`block_attention` over what a `KVCache` holds for a layer.

    Args:
      layer, part: as in `KVCache.layer`.
      segments: of entries without a cache.
      cache_end, hole: positions of a row's text, those of a shared prompt included.
      options: others of `block_attention`; no window where a prompt is shared.
    """
    cached = {} if cache is None else cache.layer(layer, part)
    if cache is None or cache.prefix is None:
        return attention(
            q, k, v, mask, **cached, cache_end=cache_end, hole=hole, lengths=lengths,
            segments=segments, **options,
        )  # fmt: skip
    shared = cache.shared
    rest = jax.tree.map(lambda x: x - shared.reshape(-1, *[1] * (x.ndim - 1)), (cache_end, hole))
    own = block_attention_lse(
        q, k, v, mask, **cached, cache_end=rest[0], hole=rest[1], lengths=lengths, **options
    )
    # The rows of a prompt ask as one: all their queries see all of it, which is read once.
    groups = cache.prefix.lengths.shape[0]
    fold = lambda x: x.reshape(groups, -1, *x.shape[2:])  # noqa: E731
    once = block_attention_lse(
        fold(q), fold(k), fold(v), BlockMask.causal(q.shape[0] // groups * q.shape[1]),
        **cache.prefix.layer(layer, part), cache_end=cache.prefix.lengths, own=False, **options,
    )  # fmt: skip
    out, lse = (x.reshape(*q.shape[:2], *x.shape[2:]) for x in once)
    return merged([own, (out, lse)])[0].astype(q.dtype)
