"""How noisy texts are read: as whole canvases, or in blocks behind the clean text.

Either way the result is what predicts each entry: its own output, or, where outputs are shifted,
that of the entry before it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.cache import KVCache
from dllm_jax.nn.transformer import Output, forward
from dllm_jax.typing import Params
from pallas_kernels import BlockMask


def canvases(
    model: Any,
    params: Params,
    noisy: Int[Array, "N B Q"],
    lengths: Int[Array, "B"],
    **options: Any,
) -> Float[Array, "N B Q D"]:
    """What predicts each entry of N noisy canvases a row.

    Args:
      options: of the forward pass over N * B rows.
    """
    count, batch, entries = noisy.shape
    out = forward(
        model, params, noisy.reshape(-1, entries), mask=BlockMask.bidirectional(entries),
        lengths=jnp.tile(lengths, count), **options,
    )  # fmt: skip
    hidden = out.hidden.reshape(count, batch, entries, -1)
    if model.config.alignment == "shifted":  # the first predicts itself, as when decoding
        hidden = jnp.concatenate([hidden[:, :, :1], hidden[:, :, :-1]], axis=2)
    return hidden


def blocks(
    model: Any,
    params: Params,
    noisy: Int[Array, "N B Q"],
    index: Int[Array, "B Q"],
    clean: Output,
    lengths: Int[Array, "B"],
    size: int,
    **options: Any,
) -> Float[Array, "N B Q D"]:
    """What predicts each entry of noisy blocks, which read the clean text before them.

    Samples are more blocks of a row, so one cache serves them all. With shifted outputs the first
    entry of a block is predicted by the last clean one, as when decoding.

    Args:
      index: the entries' positions.
      clean: the pass over the clean text.
      options: of the forward pass over B rows of N * Q entries.
    """
    count, batch, entries = noisy.shape
    begins = index[:, ::size]  # of each block
    out = forward(
        model, params, jnp.moveaxis(noisy, 0, 1).reshape(batch, -1),
        mask=BlockMask.block_diagonal(size), positions=jnp.tile(index, (1, count)),
        cache=KVCache(clean.kv, lengths),
        cache_end=jnp.tile(jnp.repeat(begins, size, axis=1), (1, count)), **options,
    )  # fmt: skip
    hidden = out.hidden.reshape(batch, count, entries, -1)
    if model.config.alignment == "shifted":
        at = jnp.clip(begins - 1, 0, clean.hidden.shape[1] - 1)
        last = jnp.take_along_axis(clean.hidden, at[..., None], axis=1)
        hidden = _shifted(hidden, last, begins == 0, size)
    return jnp.moveaxis(hidden, 1, 0)


def packed(
    model: Any,
    params: Params,
    noisy: Int[Array, "N B L"],
    batch: dict[str, jax.Array],
    size: int,
) -> tuple[Float[Array, "N B L D"], Float[Array, "B L D"]]:
    """As `blocks`, of rows with several documents: what predicts each entry, and clean outputs.

    One pass over `[clean ; noisy]`, for the documents are masks of it; the samples of a block lie
    beside each other. Blocks begin at multiples of their size; two documents in one do not see each
    other.
    """
    tokens, segments, lengths = batch["tokens"], batch["segments"], batch["lengths"]
    rows, length = tokens.shape
    count = len(noisy)

    def beside(x: jax.Array) -> jax.Array:  # [N, B, L]
        return jnp.moveaxis(x.reshape(count, rows, -1, size), 0, 2).reshape(rows, -1)

    def both(clean: jax.Array, noisy: jax.Array) -> jax.Array:
        return jnp.concatenate([clean, beside(noisy)], axis=1)

    clean = size if model.config.attention == "block_causal" else 1
    index = jnp.broadcast_to(jnp.arange(length), (rows, length))
    positions, documents = (both(x, jnp.broadcast_to(x, noisy.shape)) for x in (index, segments))
    out = forward(
        model, params, both(tokens, noisy),
        mask=BlockMask.dual_stream(length, size, clean_block=clean, repeat=count),
        positions=positions, lengths=lengths, segments=documents,
    )  # fmt: skip
    own, hidden = out.hidden[:, :length], out.hidden[:, length:]
    hidden = jnp.moveaxis(hidden.reshape(rows, -1, count, size, hidden.shape[-1]), 2, 1)
    hidden = hidden.reshape(rows, count, length, -1)
    if model.config.alignment == "shifted":
        begins = jnp.arange(length // size) * size
        last = own[:, jnp.maximum(begins - 1, 0)]
        hidden = _shifted(hidden, last, jnp.broadcast_to(begins == 0, last.shape[:2]), size)
    return jnp.moveaxis(hidden, 1, 0), own


def _shifted(
    hidden: Float[Array, "B N Q D"],
    last: Float[Array, "B G D"],
    first: Bool[Array, "B G"],
    size: int,
) -> Float[Array, "B N Q D"]:
    """Outputs one entry on; a block's first is that of the clean entry before it, if there is."""
    groups = hidden.reshape(*hidden.shape[:2], -1, size, hidden.shape[-1])
    begin = jnp.where(first[:, None, :, None, None], groups[:, :, :, :1], last[:, None, :, None])
    return jnp.concatenate([begin, groups[:, :, :, :-1]], axis=3).reshape(hidden.shape)
