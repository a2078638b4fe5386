"""The KV cache: static slots, left-aligned, one length per row.

It is read while a block is denoised and appended to once the block is done.

Keys and values lie side by side in the last axis of one stacked array, so that a scan over the
layers can close over it and pick a layer by its number without a copy, and a head size of 64 fills
a TPU's 128 lanes. Slot i of a row holds the token at position i. Taking tokens back is a smaller
length.

In int8, a row has a scale for the keys and one for the values of each layer and kv head. The first
append to a row chooses it, from the largest magnitude that it brings and some room above; what
comes later and is larger is clipped.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from dllm_jax.sharding import axis_sizes, constrain, mapped, spec_of
from pallas_kernels.block_attention.quantised import quantise

AXES = (None, "batch", "kv_heads")  # logical names of the axes of the array; slots are whole
DTYPES = ("float32", "bfloat16", "float16", "int8")
_ROOM = 1.1  # of an int8 cache: the largest number that it holds, over the first ones' largest
_UNROLL = 64  # rows; a loop over more of them compiles faster than so many updates


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of each row's decided tokens."""

    # [Ly, B, K, S, P], P = 2 * H or more (`allocate`); a tuple where layers differ in their heads
    kv: Any
    lengths: jax.Array  # int32[B]: valid slots of each row
    # of an int8 cache, what a unit of keys and of values stands for: float32[Ly, B, K, 2], as `kv`
    scale: Any = None
    # [B / n] rows that each n rows begin with, stored once: `lengths` counts them, slots do not
    prefix: "KVCache | None" = None

    @property
    def shared(self) -> jax.Array:
        """int32[B]: tokens of each row that lie in the prefix."""
        if self.prefix is None:
            return jnp.zeros_like(self.lengths)
        return jnp.repeat(self.prefix.lengths, len(self.lengths) // len(self.prefix.lengths))

    def layer(self, number: jax.Array, part: int | None = None) -> dict[str, Any]:
        """The arguments of `block_attention` that say which keys and values a layer reads.

        Args:
          number: of the layer among those of its array.
          part: which array, where there are several.
        """
        kv, scale = self.kv, self.scale
        if part is not None:
            kv, scale = kv[part], None if scale is None else scale[part]
        return {"cache": kv, "cache_scale": scale, "layer": number}

    @property
    def slots(self) -> int:
        return jax.tree.leaves(self.kv)[0].shape[3]


def allocate(
    layers: int, batch: int, kv_heads: int, slots: int, head_dim: int, dtype="float32"
) -> KVCache:
    """An empty cache of `slots` positions a row, in one of `DTYPES`.

    Keys and values of a head that is above 64 and no multiple of it (80, 96) are padded to one: a
    TPU's kernel reads whole registers.
    """
    half = head_dim if head_dim < 64 else -(-head_dim // 64) * 64
    kv = constrain(jnp.zeros((layers, batch, kv_heads, slots, 2 * half), dtype), *AXES)
    return KVCache(kv, jnp.zeros(batch, jnp.int32), scales(kv))


def scales(kv: Num[Array, "Ly B K S P"]) -> Float[Array, "Ly B K 2"] | None:
    """Of a cache without tokens; None where it needs none."""
    return constrain(jnp.ones((*kv.shape[:3], 2)), *AXES) if kv.dtype == jnp.int8 else None


def append(cache: KVCache, kv: Any, counts: Int[Array, "B"]) -> KVCache:
    """Writes `Q` entries behind each row's valid slots and keeps the first `counts[b]` of them.

    Args:
      kv: [Ly, B, K, Q, 2 * H], or a tuple of such.

    The entries past the count are written too and overwritten by the next append: a row's buffer
    needs `Q` slots behind its length, and `lax.dynamic_update_slice` would shift a write that
    overruns it.
    """
    kept = jnp.where(counts > 0, counts, _entries(kv))  # a block may be written before it counts
    scale, kv = _quantised(cache, kv, cache.lengths == 0, kept)
    starts = cache.lengths - cache.shared
    packed = jax.tree.map(lambda own, new: _written(own, new, starts), cache.kv, kv)
    return dataclasses.replace(
        cache, kv=packed, lengths=cache.lengths + counts.astype(jnp.int32), scale=scale
    )


def behind(prefix: KVCache, cache: KVCache) -> KVCache:
    """An empty `cache` of n rows for each row of `prefix`, which they begin with."""
    each = len(cache.lengths) // len(prefix.lengths)
    scale = jax.tree.map(lambda x: jnp.repeat(x, each, axis=1), prefix.scale)
    return KVCache(cache.kv, jnp.repeat(prefix.lengths, each), scale, prefix)


def replaced(cache: KVCache, kv: Any, counts: Int[Array, "B"]) -> KVCache:
    """All slots anew, from a pass over as many entries, `counts[b]` valid; the lengths stay."""
    scale, kv = _quantised(cache, kv, jnp.ones_like(counts, bool), counts)
    return dataclasses.replace(cache, kv=jax.tree.map(_laid, kv, cache.kv), scale=scale)


def cut(kv: Any, start: int, stop: int) -> Any:
    """Entries [start, stop) of what a forward pass returned."""
    return jax.tree.map(lambda x: x[:, :, :, start:stop], kv)


def _entries(kv) -> int:
    return jax.tree.leaves(kv)[0].shape[3]


def _quantised(cache: KVCache, kv: Any, fresh, counts) -> tuple[Any, Any]:
    """The scales of an int8 cache and what it is to hold; of others, both as they are.

    Args:
      fresh: bool[B]: rows whose scales are those of the first `counts[b]` of these entries.
    """
    if cache.scale is None:
        return None, kv
    scale = jax.tree.map(partial(_rescaled, fresh, counts), cache.scale, kv)
    return scale, jax.tree.map(quantise, kv, scale)


def _rescaled(fresh, counts, scale, kv):
    halves = jnp.abs(kv.astype(jnp.float32).reshape(*kv.shape[:4], 2, -1)).max(axis=5)
    counted = jnp.arange(kv.shape[3]) < counts[:, None]
    most = jnp.where(counted[None, :, None, :, None], halves, 0.0).max(axis=3)
    found = jnp.maximum(most, 1e-6) * (_ROOM / 127)
    return jnp.where(fresh[None, :, None, None], found, scale)


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
    packed: Num[Array, "Ly B K S P"], kv: Num[Array, "Ly B K Q H2"], starts: Int[Array, "B"]
) -> Num[Array, "Ly B K S P"]:
    if kv.shape[3] > packed.shape[3]:
        raise ValueError(f"{kv.shape[3]} entries do not fit a cache of {packed.shape[3]} slots")
    kv = _laid(kv, packed)

    def write(row, packed):
        own = jax.lax.dynamic_slice_in_dim(kv, row, 1, axis=1)
        return jax.lax.dynamic_update_slice(packed, own, (0, row, 0, starts[row], 0))

    # One in-place update a row; a vmap of it would be a scatter that copies the whole cache.
    rows = kv.shape[1]
    return jax.lax.fori_loop(0, rows, write, packed, unroll=rows <= _UNROLL)
