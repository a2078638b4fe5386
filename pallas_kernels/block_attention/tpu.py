"""Block attention on a TPU: a few queries against a long cache, which is read once.

A block in the making is denoised many times against a cache that does not change, so the time of a
pass is that of reading each row's valid slots. Rows of a batch are unequally long: the grid walks a
list of steps (`worklist`), each one tile of one row's cache, for each kv head.

The queries of a kv head, all its query heads together, are one axis, which lies along the lanes:
scores stand as [keys, queries], so maxima and sums over keys need no shuffle across lanes, and a
query's numbers are one lane. The entries' own keys start the running softmax and the tiles of the
cache follow; only tiles that an end, a hole or a window cuts are masked. The work list is the idea
of ragged paged attention (arXiv 2604.15464). What it costs: scripts/bench/results/tpu-bundles.md.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.block_attention import worklist
from pallas_kernels.block_attention.tuned import tiling
from pallas_kernels.masks import BlockMask

MOST_ENTRIES = 256
_LANES = 128
_SUBLANES = {"float32": 8, "bfloat16": 16}  # rows of one register
_NEG = -0.7 * float(jnp.finfo(jnp.float32).max)
_LOG2E = math.log2(math.e)
_BEHIND = 3  # parts between the scores of one and its values
_LEAST_VMEM, _MOST_VMEM = 16 << 20, 48 << 20  # bytes: granted without asking, and there to ask for


class _Spec(NamedTuple):
    """What is static in a call."""

    mask: BlockMask
    entries: int  # Q
    group: int  # query heads of a kv head
    size: int  # H
    own: int  # the entries' own keys, padded
    rows: int  # queries of one softmax update
    stretches: int  # of so many queries
    tile: int
    part: int
    window: int
    hole: bool  # whether rows have one
    soft_cap: float

    @property
    def split(self) -> bool:
        """Whether keys and values are whole registers apart, and can be told apart for free."""
        return self.size % _LANES == 0


def block_attention(
    q: Float[Array, "B Q N H"],
    k: Float[Array, "B Q K H"],
    v: Float[Array, "B Q K H"],
    mask: BlockMask,
    *,
    cache: Float[Array, "Ly B K S H2"],
    layer: Int[Array, ""] | int,
    cache_end: Int[Array, "B"],
    hole: tuple[Int[Array, "B"], Int[Array, "B"]] | None = None,
    lengths: Int[Array, "B"] | None = None,
    window: int = 0,
    scale: float | None = None,
    soft_cap: float = 0.0,
    tile: int | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B Q N H"], Float32[Array, "B Q N"]]:
    """`pallas_kernels.block_attention` over a cache, for inference: it has no gradient.

    Args:
      q, k, v, mask, cache_end, hole, lengths, window, scale: as there.
      cache: of all layers, [Ly, B, K, S, 2 * H]. Closed over by a loop over the layers it is read
        in place; a layer sliced out beforehand is a copy of it.
      layer: which of them to read.
      soft_cap: scores x become soft_cap * tanh(x / soft_cap); 0: as they are.
      tile: cache slots of a grid step, a multiple of 128 on a TPU; by `tuned.tiling` if None.
      interpret: of `pallas_call`: True or `pltpu.InterpretParams` runs it without a TPU.

    Returns:
      The attention [B, Q, N, H] in the dtype of `q`, and the natural logarithm of each query's sum
      of exponentials, float32 [B, Q, N], with which results over other keys can be merged. A query
      that sees nothing gets zeros, and -inf.

    Raises:
      ValueError: the call is not one that the kernel takes (`takes` says why).
    """
    reason = takes(q, k, mask, cache=cache, cache_end=cache_end, tile=tile)
    if reason is not None:
        raise ValueError(f"the TPU kernel of block attention cannot run this: {reason}")
    spec = _specify(q, k, mask, cache, tile)
    spec = spec._replace(window=window, hole=hole is not None, soft_cap=soft_cap)
    steps = worklist.steps(
        mask, spec.entries, spec.tile, cache.shape[3],
        cache_end=cache_end, hole=hole, lengths=lengths, window=window,
    )  # fmt: skip
    scale = q.shape[3] ** -0.5 if scale is None else scale
    # Scores come out in base 2, or ready for the tanh, at no cost where there are many of them.
    scale *= 1 / soft_cap if soft_cap else _LOG2E
    packed = _pack(spec, (q.astype(jnp.float32) * scale).astype(q.dtype), k, v)
    out, lse = _call(spec, steps, packed, cache, layer, interpret)
    return _unpack(spec, jnp.moveaxis(out, 3, 4)), _unpack(spec, lse[:, :, :, 0, :, None])[..., 0]


def takes(q, k, mask: BlockMask, *, cache=None, cache_end=None, tile=None) -> str | None:
    """Why the kernel cannot run a call, in a line, or None if it can.

    Args:
      q, k, mask, cache, cache_end, tile: of the call; arrays, or their `jax.ShapeDtypeStruct`.
    """
    entries, size = q.shape[1], q.shape[3]
    if cache is None or cache_end is None:
        return "there is no cache to read"
    if cache_end.ndim != 1:
        return "`cache_end` is per query; the kernel knows one end a row"
    if entries > MOST_ENTRIES:
        return f"{entries} entries are more than {MOST_ENTRIES}"
    if q.dtype.name not in _SUBLANES or not q.dtype == k.dtype == cache.dtype:
        return (
            "queries, keys and cache must all be float32 or all bfloat16, "
            f"not {q.dtype}, {k.dtype} and {cache.dtype}"
        )
    if 2 * size % _LANES:
        # XLA lays such a cache out with the slots innermost, and would copy it for every call.
        return f"keys and values of head size {size} do not fill registers of {_LANES} lanes"
    if tile is not None and (tile < 1 or tile % _SUBLANES[q.dtype.name]):
        return f"tile={tile} is not a positive multiple of {_SUBLANES[q.dtype.name]}"
    need = _vmem(_specify(q, k, mask, cache, tile), q.dtype.itemsize)
    if need > _MOST_VMEM:
        return f"it needs {need} bytes of vector memory, more than {_MOST_VMEM}"
    return None


def _specify(q, k, mask: BlockMask, cache, tile: int | None) -> _Spec:
    entries, heads, size = q.shape[1:]
    group, sublanes = heads // k.shape[2], _SUBLANES[q.dtype.name]
    rows = _pad(entries * group, sublanes)
    sizes = tiling(rows, size, q.dtype, cache.shape[3], tile)
    once = min(rows, sizes.rows)
    return _Spec(
        mask=mask, entries=entries, group=group, size=size, own=_pad(entries, sublanes),
        rows=once, stretches=-(-rows // once), tile=sizes.tile, part=sizes.part,
        window=0, hole=False, soft_cap=0.0,
    )  # fmt: skip


def _vmem(spec: _Spec, item: int) -> int:
    """Bytes of vector memory, about: what is in flight twice, and what a softmax update holds."""
    rows = _pad(spec.stretches * spec.rows, _LANES)
    moved = (2 * spec.tile + rows + 2 * spec.own + rows) * _pad(spec.size, _LANES) * item
    kept = rows * spec.size + spec.tile * _pad(spec.rows, _LANES) * 2
    return 2 * moved + 4 * kept


def _pack(spec: _Spec, q, k, v) -> jax.Array:
    """Queries above the entries' own keys and values: one operand, as each costs time a step.

    Returns:
      [B, K, rows + 2 * own, H], or [B, K, rows + own, 2 * H] where a head is not whole registers:
      keys and values then stay side by side, and queries are zero where values are.
    """
    batch, entries, kv_heads, size = k.shape
    q = q.reshape(batch, entries, kv_heads, spec.group, size)
    q = jnp.moveaxis(q, 2, 1).reshape(batch, kv_heads, entries * spec.group, size)
    k, v = (jnp.moveaxis(x, 2, 1) for x in (k, v))
    own = [k, v] if spec.split else [jnp.concatenate([k, v], axis=-1)]

    def padded(x, rows: int):
        lanes = own[0].shape[3] - x.shape[3]
        return jnp.pad(x, ((0, 0), (0, 0), (0, rows - x.shape[2]), (0, lanes)))

    queries = padded(q, spec.stretches * spec.rows)
    return jnp.concatenate([queries, *(padded(x, spec.own) for x in own)], axis=2)


def _unpack(spec: _Spec, x) -> jax.Array:
    """[B, K, stretches, rows, X] as [B, Q, N, X]."""
    batch, kv_heads, _, _, width = x.shape
    x = x.reshape(batch, kv_heads, -1, width)[:, :, : spec.entries * spec.group]
    x = jnp.moveaxis(x.reshape(batch, kv_heads, spec.entries, spec.group, width), 1, 2)
    return x.reshape(batch, spec.entries, kv_heads * spec.group, width)


def _call(spec: _Spec, steps: worklist.Steps, packed, cache, layer, interpret):
    batch, kv_heads, height, width = packed.shape
    slots, pair = cache.shape[3:]
    results = (spec.stretches, spec.size, spec.rows), (spec.stretches, 1, spec.rows)
    sums = (spec.stretches, 8, spec.rows)
    read, item = batch * kv_heads * slots, packed.dtype.itemsize

    def of_row(head, step, layer, row, *_):
        return row[step], head, 0, 0

    def of_result(head, step, layer, row, *_):
        return row[step], head, 0, 0, 0

    def of_tile(head, step, layer, row, source, tile, *_):
        return layer[0], source[step], head, tile[step], 0

    return pl.pallas_call(
        functools.partial(_kernel, spec=spec),
        out_shape=tuple(
            jax.ShapeDtypeStruct((batch, kv_heads, *shape), dtype)
            for shape, dtype in zip(results, (packed.dtype, jnp.float32), strict=True)
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(kv_heads, steps.total),
            in_specs=[
                pl.BlockSpec((None, None, height, width), of_row),
                pl.BlockSpec((None, None, None, spec.tile, pair), of_tile),
            ],
            out_specs=[pl.BlockSpec((None, None, *shape), of_result) for shape in results],
            scratch_shapes=[
                pltpu.VMEM(shape, jnp.float32) for shape in (results[1], sums, results[0])
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=min(max(2 * _vmem(spec, item), _LEAST_VMEM), _MOST_VMEM),
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * read * spec.stretches * spec.rows * spec.size,
            transcendentals=read * spec.stretches * spec.rows,
            bytes_accessed=read * pair * item + 2 * batch * kv_heads * height * width * item,
        ),
        interpret=interpret,
        name="block_attention_decode",
    )(jnp.asarray(layer, jnp.int32).reshape(1), *steps[:5], packed, cache)


def _kernel(layer, row, source, tile, flags, bounds, packed, cached, out, lse, top, total, acc, *,
            spec: _Spec):  # fmt: skip
    step = pl.program_id(1)
    at = row[step]
    flag = flags[step]
    state = top, total, acc

    @pl.when(flag & worklist.FIRST != 0)
    def _():
        _each(top, lambda i: _own(spec, i, bounds[worklist.VALID, at], packed, state))

    for kind in (worklist.WHOLE, worklist.CUT):

        @pl.when(flag & kind != 0)
        def _(kind=kind):
            numbers = [bounds[i, at] for i in range(len(bounds))] if kind == worklist.CUT else None
            slot = tile[step] * spec.tile
            _each(top, lambda i: _cached(spec, i, slot, numbers, packed, cached, state))

    @pl.when(flag & worklist.LAST != 0)
    def _():
        _each(top, lambda i: _write(i, state, out, lse))


def _each(top, run):
    """`run(i)` for each of the stretches of query rows that are updated at once."""
    if top.shape[0] == 1:
        run(0)
    else:
        lax.fori_loop(0, top.shape[0], lambda i, _: run(i), None)


def _own(spec: _Spec, i, valid, packed, state):
    """The running softmax begins with the entries' own keys."""
    top, total, acc = state
    height = top.shape[0] * spec.rows
    pair = packed[height:]
    keys, values = (pair[: spec.own], pair[spec.own :]) if spec.split else (pair, pair)
    scores = _scores(spec, keys, _queries(spec, i, packed))
    query = _query(spec, i)
    key = lax.broadcasted_iota(jnp.int32, (spec.own, 1), 0)
    clean = key < spec.mask.clean
    visible = spec.mask.allow(query, key) & (key < spec.entries)
    visible &= ~clean | (key < valid)
    if spec.window:
        visible &= ~clean | (key > worklist.place(spec.mask, query, valid) - spec.window)
    scores = jnp.where(visible, scores, _NEG)
    most = scores.max(axis=0, keepdims=True)
    weights = jnp.exp2(scores - most)
    top[i], total[i], acc[i] = most, _sums(weights), _mixed(spec, values, weights)


def _cached(spec: _Spec, i, slot, numbers, packed, cached, state):
    """The running softmax goes on over a tile; `numbers` of the row if something cuts the tile."""
    top, total, acc = state
    queries = _queries(spec, i, packed)
    most, sums, mixed = top[i], total[i], acc[i]
    parts = spec.tile // spec.part
    scores, weights, shrinks = [], [], []

    def readable(part):
        slots = lax.broadcasted_iota(jnp.int32, (spec.part, 1), 0) + (slot + part * spec.part)
        return slots, _readable(spec, numbers, slots)

    def pair(part):
        found = cached[part * spec.part : (part + 1) * spec.part]
        return (found[:, : spec.size], found[:, spec.size :]) if spec.split else (found, found)

    # The products of a part stand beside the softmax of another, which does not wait for them: the
    # compiler schedules in about the order that it is given. This one takes up to a third less.
    for part in range(parts + _BEHIND):
        if part < parts:
            scores.append(_scores(spec, pair(part)[0], queries))
        if 1 <= part <= parts:
            x = scores[part - 1]
            if numbers is not None:
                slots, visible = readable(part - 1)
                if spec.window:
                    stands = worklist.place(spec.mask, _query(spec, i), numbers[worklist.VALID])
                    visible &= slots > numbers[worklist.BASE] + stands - spec.window
                x = jnp.where(visible, x, _NEG)
            before, most = most, jnp.maximum(most, x.max(axis=0, keepdims=True))
            x = jnp.exp2(x - most)
            shrinks.append(jnp.exp2(before - most))
            sums = sums * shrinks[-1] + _sums(x)
            weights.append(x.astype(packed.dtype))
        if part >= _BEHIND:
            values = pair(part - _BEHIND)[1]
            if numbers is not None:
                # A slot nobody reads may hold anything, and 0 * NaN is NaN: clear its values.
                values = jnp.where(readable(part - _BEHIND)[1], values, jnp.zeros_like(values))
            mixed = mixed * shrinks[part - _BEHIND] + _mixed(spec, values, weights[part - _BEHIND])
    top[i], total[i], acc[i] = most, sums, mixed


def _write(i, state, out, lse):
    top, total, acc = (x[i] for x in state)
    total = total.sum(axis=0, keepdims=True)
    # Nothing of a tile that a query does not see counts once it has seen something: the larger
    # maximum takes it to zero. Who has seen nothing to the end has the maximum of masked scores.
    seen = top > _NEG
    out[i] = jnp.where(seen, acc / total, 0.0).astype(out.dtype)
    lse[i] = jnp.where(seen, (top + jnp.log2(total)) / _LOG2E, -jnp.inf)


def _readable(spec: _Spec, numbers, slot):
    """Slots that some query of the row reads."""
    inside = slot < numbers[worklist.END]
    if spec.window:
        inside &= slot >= numbers[worklist.START]
    if spec.hole:
        inside &= (slot < numbers[worklist.HOLE]) | (slot >= numbers[worklist.HOLE_END])
    return inside


def _queries(spec: _Spec, i, packed):
    return packed[pl.ds(pl.multiple_of(i * spec.rows, spec.rows), spec.rows)]


def _query(spec: _Spec, i):
    """The entry that each row is a head of, int32[1, rows]."""
    row = lax.broadcasted_iota(jnp.int32, (1, spec.rows), 1) + i * spec.rows
    return row // spec.group


def _scores(spec: _Spec, keys, queries):
    """Scores in base 2, float32[keys, rows]."""
    scores = _dot(keys, queries, 1, 1)
    return jnp.tanh(scores) * (spec.soft_cap * _LOG2E) if spec.soft_cap else scores


def _sums(weights):
    """Sums over the keys that are left apart by sublane, [8, rows]."""
    return weights.reshape(-1, 8, weights.shape[1]).sum(axis=0)


def _mixed(spec: _Spec, values, weights):
    """Values weighed, float32[H, rows]."""
    return _dot(values, weights.astype(values.dtype), 0, 0)[-spec.size :]


def _dot(a, b, axis: int, other: int):
    """The product over axis `axis` of `a` and `other` of `b`, in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((axis,), (other,)), ((), ())), precision=precision,
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def _pad(x: int, step: int) -> int:
    return -(-x // step) * step
