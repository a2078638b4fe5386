"""A long prompt goes through the model in chunks, each against the cache of those before it.

    [ chunk ] [ chunk ] ... [ what is left | the first canvas, which rides on the last pass ]

So the activations of a prefill are those of a chunk, however long the prompt is. It is exact where
no token of the prompt sees a later chunk: in causal models, and in block-causal ones whose chunks
are whole blocks. Rows end in different chunks; a row that has ended waits, and its last hidden
state is kept for the token behind it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dllm_jax.cache import KVCache, append
from dllm_jax.decode.state import gather
from pallas_kernels import BlockMask

CHUNK = 4096  # tokens; longer prompts go in chunks of so many, where nobody says otherwise


def before_last(
    passed: Callable[..., Any], tokens: jax.Array, ends: jax.Array, cache: KVCache, last: jax.Array,
    count: int, chunk: int, seen: int, twice: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> tuple[KVCache, jax.Array]:  # fmt: skip
    """`count` chunks of a prompt into the cache.

    Args:
      passed: `passed(entries [B, C], at [B, C], **options)`, one forward pass.
      tokens: int32[B, L].
      ends: int32[B]: where the part of each row ends that is to be cached.
      last: [R, 1, D], what stands for the last hidden state of a row that ends in no chunk.
      seen: tokens of a block, which see each other.
      twice: from what is [B, ...] to [R, ...], the rows of the cache.

    Returns:
      The cache, and the hidden state of the last token of each row that ended, [R, 1, D].
    """
    mask = BlockMask.block_causal(chunk, seen)

    def one(number, carry):
        cache, last = carry
        start = number * chunk
        entries = jax.lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1)
        at = jnp.broadcast_to(start + jnp.arange(chunk), entries.shape)
        lengths = jnp.clip(ends - start, 0, chunk)
        out = passed(
            entries, at, mask=mask, lengths=lengths, cache=cache, cache_end=jnp.minimum(ends, start)
        )
        own = gather(out.hidden, twice(lengths) - 1, 1)
        last = jnp.where(twice(lengths > 0)[:, None, None], own, last)
        return append(cache, out.kv, twice(lengths)), last

    return jax.lax.fori_loop(0, count, one, (cache, last))


def parts(width: int, chunk: int) -> tuple[int, int]:
    """Of a prompt of `width`: how many chunks go before the last pass, and where that begins."""
    count = (width - 1) // chunk if chunk else 0
    return count, count * chunk
