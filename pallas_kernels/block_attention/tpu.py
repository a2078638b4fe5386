"""Block attention on a TPU: a few queries against a long cache, which is read once.

A block in the making is denoised many times against a cache that does not change, so the time of a
pass is that of reading each row's valid slots. Rows of a batch are unequally long: the grid walks a
list of steps (`worklist`), each one tile of one row's cache, for each kv head.

The queries of a kv head, all its query heads together, are one axis, which lies along the lanes:
scores stand as [keys, queries], so maxima and sums over keys need no shuffle across lanes, and a
query's numbers are one lane. The entries' own keys start the running softmax and the tiles of the
cache follow; only tiles that an end, a hole or a window cuts are masked. The work list is the idea
of ragged paged attention (arXiv 2604.15464). What it costs: scripts/bench/results/tpu-bundles.md.

An int8 cache is widened in VMEM, and its scales cost nothing: the keys' is in the queries that meet
the cache, the values' in the result, out of which the entries' own values are divided first.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Float32, Int, Int8

from pallas_kernels.block_attention import worklist
from pallas_kernels.block_attention.tpu_kernel import LANES, LOG2E, Spec, kernel
from pallas_kernels.block_attention.tuned import tiling
from pallas_kernels.masks import BlockMask

MOST_ENTRIES = 256
_SUBLANES = {"float32": 8, "bfloat16": 16, "int8": 32}  # rows of one register
_LEAST_VMEM, _MOST_VMEM = 16 << 20, 48 << 20  # bytes: granted without asking, and there to ask for


def block_attention(
    q: Float[Array, "B Q N H"],
    k: Float[Array, "B Q K H"],
    v: Float[Array, "B Q K H"],
    mask: BlockMask,
    *,
    cache: Float[Array, "Ly B K S P"] | Int8[Array, "Ly B K S P"],
    layer: Int[Array, ""] | int,
    cache_end: Int[Array, "B"] | Int[Array, "B Q"],
    cache_scale: Float32[Array, "Ly B K 2"] | None = None,
    chosen: Bool[Array, "B M"] | None = None,
    hole: tuple[Int[Array, "B"], Int[Array, "B"]] | None = None,
    lengths: Int[Array, "B"] | None = None,
    own: bool = True,
    window: int = 0,
    scale: float | None = None,
    soft_cap: float = 0.0,
    tile: int | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B Q N H"], Float32[Array, "B Q N"]]:
    """`pallas_kernels.block_attention` over a cache, for inference: it has no gradient.

    Args:
      q, k, v, mask, cache_end, chosen, hole, lengths, own, window, scale, soft_cap: as there.
      cache, cache_scale: of all layers, [Ly, B, K, S, P] and [Ly, B, K, 2]. Closed over by a loop
        over the layers it is read in place; a layer sliced out beforehand is a copy of it.
      layer: which of them to read.
      tile: cache slots of a grid step, a multiple of 128 on a TPU, which divides the slots of a
        piece that `chosen` chooses; by `tuned.tiling` if None.
      interpret: of `pallas_call`: True or `pltpu.InterpretParams` runs it without a TPU.

    Returns:
      The attention [B, Q, N, H] in the dtype of `q`, and the natural logarithm of each query's sum
      of exponentials, float32 [B, Q, N], with which results over other keys can be merged. A query
      that sees nothing gets zeros, and -inf.

    Raises:
      ValueError: the call is not one that the kernel takes (`takes` says why).
    """
    reason = takes(q, k, mask, cache=cache, cache_end=cache_end, chosen=chosen, own=own, tile=tile)
    if reason is not None:
        raise ValueError(f"the TPU kernel of block attention cannot run this: {reason}")
    batch, entries, heads, size = q.shape
    seen = worklist.reach(
        mask, entries, cache_end=cache_end, hole=hole, lengths=lengths, window=window
    )
    valid = jnp.full(batch, mask.clean) if lengths is None else lengths
    scales = None if cache_scale is None else cache_scale[layer]
    pieces = -(-entries // MOST_ENTRIES)
    if pieces > 1:  # of a long pass stand for rows, which read the same cache
        q = _pieces(q, pieces)
        seen = worklist.Reach(*(
            _pieces(x, pieces) if x.shape[1] > 1 else x.repeat(pieces, axis=0) for x in seen
        ))  # fmt: skip
        valid, hole, chosen, scales = jax.tree.map(
            lambda x: x.repeat(pieces, axis=0), (valid, hole, chosen, scales)
        )
    spec = _specify(q, mask, cache, chosen, own, tile)
    spec = spec._replace(
        window=window, hole=hole is not None, each=seen.end.shape[1] > 1, soft_cap=soft_cap
    )
    steps = worklist.steps(seen, valid, spec.tile, cache.shape[3], hole=hole, chosen=chosen)
    steps = steps._replace(source=steps.source // pieces)
    scale = size**-0.5 if scale is None else scale
    # Scores come out in base 2, or ready for the tanh, at no cost where there are many of them.
    scale *= 1 / soft_cap if soft_cap else LOG2E
    packed = _pack(spec, q.astype(jnp.float32) * scale, (k, v) if own else (), scales, q.dtype)
    limits = [_limits(spec, seen)] if spec.each else []
    out, lse = _call(spec, steps, packed, limits, scales, cache, layer, interpret)
    out, lse = _unpack(spec, jnp.moveaxis(out, 3, 4)), _unpack(spec, lse[:, :, :, 0, :, None])
    out = out.reshape(batch, -1, *out.shape[2:])[:, :entries, :, :size]
    return out, lse.reshape(batch, -1, heads)[:, :entries]


def takes(q, k, mask: BlockMask, *, cache=None, cache_end=None, chosen=None, own=True,
          tile=None) -> str | None:  # fmt: skip
    """Why the kernel cannot run a call, in a line, or None if it can.

    Args:
      q, k, mask, cache, cache_end, chosen, own, tile: of the call; arrays, or their
        `jax.ShapeDtypeStruct`.
    """
    entries, size = q.shape[1], q.shape[3]
    if cache is None or cache_end is None:
        return "there is no cache to read"
    if own and entries > MOST_ENTRIES:
        return f"{entries} entries are more than {MOST_ENTRIES}; it takes them with own=False"
    if (
        q.dtype.name not in ("float32", "bfloat16")
        or k.dtype != q.dtype
        or cache.dtype not in (q.dtype, jnp.int8)
    ):
        return (
            "queries and keys must both be float32 or both bfloat16, and the cache so too or int8, "
            f"not {q.dtype}, {k.dtype} and {cache.dtype}"
        )
    slots, pair = cache.shape[3:]
    if pair % LANES:
        # XLA lays such a cache out with the slots innermost, and would copy it for every call.
        return (
            f"keys and values of head size {size} in a cache of {pair} lanes do not fill registers "
            f"of {LANES}; pad its last axis to {2 * _pad(size, LANES // 2)}"
        )
    least = _SUBLANES[cache.dtype.name]
    if tile is not None and (tile < 1 or tile % least):
        return f"tile={tile} is not a positive multiple of {least}"
    if chosen is not None and (slots // chosen.shape[1]) % (tile or least):
        return (
            f"of {slots} slots, {chosen.shape[1]} pieces to choose from are not whole tiles "
            f"of {tile or least}"
        )
    need = _vmem(
        _specify(q, mask, cache, chosen, own, tile), q.dtype.itemsize, cache.dtype.itemsize
    )
    if need > _MOST_VMEM:
        return f"it needs {need} bytes of vector memory, more than {_MOST_VMEM}"
    return None


def _specify(q, mask: BlockMask, cache, chosen, own: bool, tile: int | None) -> Spec:
    entries, heads, kv_heads, slots = min(q.shape[1], MOST_ENTRIES), q.shape[2], *cache.shape[2:4]
    group, size, sublanes = heads // kv_heads, cache.shape[4] // 2, _SUBLANES[q.dtype.name]
    piece = 0 if chosen is None else slots // chosen.shape[1]
    sizes = tiling(entries * group, size, cache.dtype, slots, tile, piece)
    rows = _pad(entries * group, sublanes)
    once = min(rows, sizes.rows)
    return Spec(
        mask=mask, entries=entries, group=group, size=size, own=own * _pad(entries, sublanes),
        rows=once, stretches=-(-rows // once), tile=sizes.tile, part=sizes.part,
        window=0, hole=False, each=False, widened=cache.dtype == jnp.int8, soft_cap=0.0,
    )  # fmt: skip


def _vmem(spec: Spec, item: int, cached: int) -> int:
    """Bytes of vector memory, about: what is in flight twice, and what a softmax update holds."""
    rows, size = _pad(spec.height, LANES), _pad(spec.size, LANES)
    moved = 2 * spec.tile * cached + ((2 + spec.widened) * rows + 2 * spec.own) * item
    kept = rows * spec.size + spec.tile * _pad(spec.rows, LANES) * 2
    return 2 * moved * size + 4 * kept


def _pieces(x, count: int):
    """[B, Q, ...] as [B * count, Q / count, ...], the last entry repeated to fill."""
    more = -x.shape[1] % count
    x = jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2), mode="edge")
    return x.reshape(len(x) * count, -1, *x.shape[2:])


def _pack(spec: Spec, q, own, scales, dtype) -> jax.Array:
    """Queries above the entries' own keys and values: one operand, as each costs time a step.

    Args:
      q: float32, scaled.
      own: keys and values; nothing where they are left out.
      scales: of an int8 cache, [B, K, 2]. The queries that meet the entries' own keys then follow
        those that meet the cache.

    Returns:
      [B, K, rows + 2 * own, H], or [B, K, rows + own, 2 * H] where a head is not whole registers:
      keys and values then stay side by side, and queries are zero where values are.
    """
    batch, entries, _, size = q.shape
    q = jnp.moveaxis(q.reshape(batch, entries, -1, spec.group, size), 2, 1)
    q = q.reshape(batch, -1, entries * spec.group, size)
    queries = [q]
    if scales is not None:
        queries = [q * scales[..., :1, None], q] if own else [q * scales[..., :1, None]]
    own = [jnp.moveaxis(x, 2, 1) for x in own]
    if own and not spec.split:
        own = [jnp.concatenate([_padded(x, x.shape[2], spec.size) for x in own], axis=-1)]
    width = spec.size if spec.split else 2 * spec.size
    queries = [_padded(x, spec.height, width).astype(dtype) for x in queries]
    return jnp.concatenate([*queries, *(_padded(x, spec.own, width) for x in own)], axis=2)


def _padded(x, rows: int, lanes: int):
    """[..., rows, lanes] with zeros behind what is there."""
    more = [(0, rows - x.shape[-2]), (0, lanes - x.shape[-1])]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + more)


def _limits(spec: Spec, seen: worklist.Reach) -> jax.Array:
    """The slots that each query row sees, int32[B, stretches, 2, rows]: the first, and the end."""
    limits = jnp.stack(seen, axis=1).astype(jnp.int32).repeat(spec.group, axis=2)
    limits = _padded(limits, 2, spec.height).reshape(-1, 2, spec.stretches, spec.rows)
    return jnp.moveaxis(limits, 1, 2)


def _unpack(spec: Spec, x) -> jax.Array:
    """[B, K, stretches, rows, X] as [B, Q, N, X]."""
    batch, kv_heads, _, _, width = x.shape
    x = x.reshape(batch, kv_heads, -1, width)[:, :, : spec.entries * spec.group]
    x = jnp.moveaxis(x.reshape(batch, kv_heads, spec.entries, spec.group, width), 1, 2)
    return x.reshape(batch, spec.entries, kv_heads * spec.group, width)


def _call(spec: Spec, steps: worklist.Steps, packed, limits, scales, cache, layer, interpret):
    batch, kv_heads, height, width = packed.shape
    slots, pair = cache.shape[3:]
    numbers = [jnp.asarray(layer, jnp.int32).reshape(1), *steps[:5]]
    if scales is not None:
        numbers.append(scales[..., 1].T)
    results = (spec.stretches, spec.size, spec.rows), (spec.stretches, 1, spec.rows)
    sums = (spec.stretches, 8, spec.rows)
    read, items = batch * kv_heads * slots, (packed.dtype.itemsize, cache.dtype.itemsize)

    def of_row(head, step, layer, row, *_):
        return row[step], head, 0, 0

    def of_limits(head, step, layer, row, *_):
        return row[step], 0, 0, 0

    def of_result(head, step, layer, row, *_):
        return row[step], head, 0, 0, 0

    def of_tile(head, step, layer, row, source, tile, *_):
        return layer[0], source[step], head, tile[step], 0

    return pl.pallas_call(
        functools.partial(kernel, spec=spec),
        out_shape=tuple(
            jax.ShapeDtypeStruct((batch, kv_heads, *shape), dtype)
            for shape, dtype in zip(results, (packed.dtype, jnp.float32), strict=True)
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(numbers),
            grid=(kv_heads, steps.total),
            in_specs=[
                pl.BlockSpec((None, None, height, width), of_row),
                *(pl.BlockSpec((None, *x.shape[1:]), of_limits) for x in limits),
                pl.BlockSpec((None, None, None, spec.tile, pair), of_tile),
            ],
            out_specs=[pl.BlockSpec((None, None, *shape), of_result) for shape in results],
            scratch_shapes=[
                pltpu.VMEM(shape, jnp.float32) for shape in (results[1], sums, results[0])
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=min(max(2 * _vmem(spec, *items), _LEAST_VMEM), _MOST_VMEM),
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * read * spec.stretches * spec.rows * spec.size,
            transcendentals=read * spec.stretches * spec.rows,
            bytes_accessed=read * pair * items[1] + 2 * packed.size * items[0],
        ),
        interpret=interpret,
        name="block_attention_decode",
    )(*numbers, packed, *limits, cache)


def _pad(x: int, step: int) -> int:
    return -(-x // step) * step
