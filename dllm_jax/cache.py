"""The KV cache: static slots, left-aligned, one length per row.

It is read while a block is denoised and appended to once the block is done.

Keys and values lie side by side in the last axis of one stacked array, so that a scan over the
layers can close over it and pick a layer by its number without a copy, and a head size of 64 fills
a TPU's 128 lanes. Slot i of a row holds the token at position i. Taking tokens back is a smaller
length.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dllm_jax.sharding import axis_sizes, constrain, mapped, spec_of

AXES = (None, "batch", "kv_heads")  # logical names of the axes of the array; slots are whole
_UNROLL = 64  # rows; a loop over more of them compiles faster than so many updates


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of each row's decided tokens."""

    # [Ly, B, K, S, P], P = 2 * H or more (`allocate`); a tuple where layers differ in their heads
    kv: Any
    lengths: jax.Array  # int32[B]: valid slots of each row

    @property
    def slots(self) -> int:
        return jax.tree.leaves(self.kv)[0].shape[3]


def allocate(
    layers: int, batch: int, kv_heads: int, slots: int, head_dim: int, dtype="float32"
) -> KVCache:
    """An empty cache of `slots` positions a row.

    Keys and values of a head that is above 64 and no multiple of it (80, 96) are padded to one: a
    TPU's kernel reads whole registers.
    """
    half = head_dim if head_dim < 64 else -(-head_dim // 64) * 64
    kv = constrain(jnp.zeros((layers, batch, kv_heads, slots, 2 * half), dtype), *AXES)
    return KVCache(kv, jnp.zeros(batch, jnp.int32))


def append(cache: KVCache, kv: Any, counts: Int[Array, "B"]) -> KVCache:
    """Writes `Q` entries behind each row's valid slots and keeps the first `counts[b]` of them.

    Args:
      kv: [Ly, B, K, Q, 2 * H], or a tuple of such.

    The entries past the count are written too and overwritten by the next append: a row's buffer
    needs `Q` slots behind its length, and `lax.dynamic_update_slice` would shift a write that
    overruns it.
    """
    packed = jax.tree.map(lambda own, new: _written(own, new, cache.lengths), cache.kv, kv)
    return KVCache(packed, cache.lengths + counts.astype(jnp.int32))


def replaced(cache: KVCache, kv: Any) -> KVCache:
    """All slots anew, from a pass over as many entries; the lengths stay."""
    return KVCache(jax.tree.map(_laid, kv, cache.kv), cache.lengths)


def cut(kv: Any, start: int, stop: int) -> Any:
    """Entries [start, stop) of what a forward pass returned."""
    return jax.tree.map(lambda x: x[:, :, :, start:stop], kv)


def _laid(kv, packed):
    """Keys and values of a pass as they lie in a cache: its dtype, its padding."""
    kv = kv.astype(packed.dtype)
    padding = (packed.shape[4] - kv.shape[4]) // 2
    if not padding:
        return kv
    halves = kv.reshape(*kv.shape[:4], 2, -1)
    return jnp.pad(halves, ((0, 0),) * 5 + ((0, padding),)).reshape(*kv.shape[:4], -1)


def _written(packed, kv, starts):
    """`_write`, of each device's own rows and heads where they lie on a mesh: nothing travels."""
    if not axis_sizes():
        return _write(packed, kv, starts)
    lie = spec_of(packed.shape, *AXES)
    return mapped(_write, (lie, lie, spec_of(starts.shape, "batch")), lie)(packed, kv, starts)


def _write(
    packed: Float[Array, "Ly B K S P"], kv: Float[Array, "Ly B K Q H2"], starts: Int[Array, "B"]
) -> Float[Array, "Ly B K S P"]:
    if kv.shape[3] > packed.shape[3]:
        raise ValueError(f"{kv.shape[3]} entries do not fit a cache of {packed.shape[3]} slots")
    kv = _laid(kv, packed)

    def write(row, packed):
        own = jax.lax.dynamic_slice_in_dim(kv, row, 1, axis=1)
        return jax.lax.dynamic_update_slice(packed, own, (0, row, 0, starts[row], 0))

    # One in-place update a row; a vmap of it would be a scatter that copies the whole cache.
    rows = kv.shape[1]
    return jax.lax.fori_loop(0, rows, write, packed, unroll=rows <= _UNROLL)
