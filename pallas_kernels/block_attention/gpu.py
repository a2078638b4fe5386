"""Block attention on a Hopper GPU: a few queries against a long cache, which is read once.

A program of the grid is one row of the batch, one kv head, a stretch of its query rows, and a share
of the tiles that they read: few rows of a batch would leave most of the chip idle, so the tiles of
a row are shared out and the results merged by their log-sum-exps. One warpgroup holds 64 query rows
(one wgmma is so high) with their running softmax in registers, and the warpgroups of a program read
the same tiles. The first one also asks for the next tile, as soon as all are done with the one that
it replaces; a copy brings keys and values, as they lie side by side.

The entries' own keys and values are further tiles, so nothing else runs than the packing of the
queries before and the merge after. What a query may read, cached or own, is two intervals of keys
(`shares`): of a cache, up to a hole and behind it; of the entries, clean ones and its own group.
Tiles outside of these intervals are not read; only tiles that one cuts for some query are masked.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.block_attention import shares
from pallas_kernels.masks import BlockMask

MOST_ENTRIES = 256
_ROWS = 64  # query rows of a warpgroup
_SUBROWS, _CHUNK = 8, 64  # rows and columns of what shared memory is swizzled in, in bfloat16
_MOST_GROUPS = 2  # warpgroups of a program: more would have too few registers each
_CORES = 132  # streaming multiprocessors of an H100
_NEG = -(2.0**100)  # a score that nobody sees: a power of two, so that scaling it is exact
_LOG2E = math.log2(math.e)


class _Tiling(NamedTuple):
    """Sizes for heads of one size, and programs of one or two warpgroups."""

    tile: int  # keys of one softmax update, a multiple of 64
    stages: int  # tiles in shared memory
    places: int  # programs that a multiprocessor holds at once


# Where memory is waited for, two programs share a multiprocessor; where products and exponentials
# are, a longer tile shares out what a tile costs. None of them spills a register.
_TILINGS = {
    (64, 1): _Tiling(128, 3, 2),
    (64, 2): _Tiling(128, 5, 1),
    (128, 1): _Tiling(64, 3, 2),
    (128, 2): _Tiling(128, 3, 1),
    (256, 1): _Tiling(64, 3, 1),
    (256, 2): _Tiling(64, 2, 1),
}
_SIZES = sorted({size for size, _ in _TILINGS})


class _Spec(NamedTuple):
    """What is static in a call."""

    size: int  # H
    tile: int
    stages: int
    groups: int  # warpgroups of a program
    stretches: int  # of query rows, each a program
    splits: int  # programs that share the tiles of a stretch
    scale: float
    soft_cap: float
    interpreted: bool

    @property
    def rows(self) -> int:
        """Query rows of a program."""
        return self.groups * _ROWS

    @property
    def times(self) -> float:
        """What makes scores of products, or of their tanh, in base 2; part of the exponential."""
        return _LOG2E * (self.soft_cap or self.scale)


def block_attention(
    q: Float[Array, "B Q N H"],
    k: Float[Array, "B Q K H"],
    v: Float[Array, "B Q K H"],
    mask: BlockMask,
    *,
    cache: Float[Array, "Ly B K S H2"],
    layer: Int[Array, ""] | int,
    cache_end: Int[Array, "B"],
    cache_scale: None = None,
    chosen: None = None,
    hole: tuple[Int[Array, "B"], Int[Array, "B"]] | None = None,
    lengths: Int[Array, "B"] | None = None,
    own: bool = True,
    window: int = 0,
    scale: float | None = None,
    soft_cap: float = 0.0,
    splits: int | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "B Q N H"], Float32[Array, "B Q N"]]:
    """`pallas_kernels.block_attention` over a cache, for inference: it has no gradient.

    Args:
      q, k, v, mask, cache_end, hole, lengths, window, scale: as there.
      cache: of all layers, [Ly, B, K, S, 2 * H]. Closed over by a loop over the layers it is read
        in place; a layer sliced out beforehand is a copy of it.
      layer: which of them to read.
      cache_scale, chosen, own: as there; int8 caches, pieces to choose from and attention over the
        cache alone are not for this kernel.
      soft_cap: scores x become soft_cap * tanh(x / soft_cap); 0: as they are.
      splits: programs that share the tiles of a row; as many as fill the chip if None.
      interpret: `plgpu.InterpretGPUParams` runs it without a GPU.

    Returns:
      The attention [B, Q, N, H] in the dtype of `q`, and the natural logarithm of each query's sum
      of exponentials, float32 [B, Q, N], with which results over other keys can be merged. A query
      that sees nothing gets zeros, and -inf.

    Raises:
      ValueError: the call is not one that the kernel takes (`takes` says why).
    """
    reason = takes(q, k, mask, cache=cache, cache_end=cache_end, chosen=chosen, own=own)
    if reason is not None:
        raise ValueError(f"the GPU kernel of block attention cannot run this: {reason}")
    batch, entries, heads, size = q.shape
    kv_heads, group = k.shape[2], heads // k.shape[2]
    reach = min(cache.shape[3], window + entries) if window else cache.shape[3]
    spec = _specify(batch, kv_heads, entries * group, size, reach, splits)._replace(
        scale=size**-0.5 if scale is None else scale, soft_cap=soft_cap, interpreted=bool(interpret)
    )
    edges = shares.edges(
        mask, entries, cache.shape[3],
        cache_end=cache_end, hole=hole, lengths=lengths, window=window,
    )  # fmt: skip
    edges = _padded(jnp.repeat(edges, group, axis=3), 3, spec.stretches * spec.rows, mode="edge")
    numbers = shares.numbers(edges, spec.rows, spec.tile)
    pairs = _padded(_own(k, v), 2, _multiple(entries, spec.tile))
    out, lse = _call(
        spec, jnp.asarray(layer, jnp.int32).reshape(1), numbers, edges, _by_head(q, kv_heads),
        pairs, cache, interpret,
    )  # fmt: skip
    out, lse = _merged(out, lse)
    return _by_entry(out, entries, group), _by_entry(lse[..., None], entries, group)[..., 0]


def takes(q, k, mask: BlockMask, *, cache=None, cache_end=None, chosen=None,
          own=True) -> str | None:  # fmt: skip
    """Why the kernel cannot run a call, in a line, or None if it can.

    Args:
      q, k, mask, cache, cache_end, chosen, own: of the call; arrays, or their
        `jax.ShapeDtypeStruct`.
    """
    entries, size = q.shape[1], q.shape[3]
    if jax.__version_info__ < (0, 12):
        return f"it needs JAX 0.12 or later, and this is {jax.__version__}"
    if cache is None or cache_end is None:
        return "there is no cache to read"
    if cache_end.ndim != 1:
        return "`cache_end` is per query; the kernel knows one end a row"
    if chosen is not None or not own:
        return "it reads the whole of a cache, and the entries' own keys"
    if entries > MOST_ENTRIES:
        return f"{entries} entries are more than {MOST_ENTRIES}"
    if not q.dtype == k.dtype == cache.dtype == jnp.bfloat16:
        return (
            "queries, keys and cache must all be bfloat16, "
            f"not {q.dtype}, {k.dtype} and {cache.dtype}"
        )
    if size > _SIZES[-1]:
        return f"heads of {size} leave no room in shared memory for a tile that is on its way"
    if size not in _SIZES:
        return f"the head size must be one of {', '.join(map(str, _SIZES))}, not {size}"
    if cache.shape[3] % _SUBROWS:
        return f"a cache of {cache.shape[3]} slots is not a multiple of {_SUBROWS}"
    return None


def _specify(
    batch: int, kv_heads: int, rows: int, size: int, reach: int, splits: int | None
) -> _Spec:
    blocks = -(-rows // _ROWS)
    stretches = -(-blocks // _MOST_GROUPS)
    groups = -(-blocks // stretches)
    tiling = _TILINGS[size, groups]
    if splits is None:
        programs, places = batch * kv_heads * stretches, _CORES * tiling.places
        splits = shares.splits(programs, places, reach // tiling.tile, uneven=batch > 1)
    return _Spec(
        size=size, tile=tiling.tile, stages=tiling.stages, groups=groups, stretches=stretches,
        splits=splits, scale=1.0, soft_cap=0.0, interpreted=False,
    )  # fmt: skip


def _call(spec: _Spec, layer, numbers, edges, queries, own, cache, interpret):
    """Rows of queries and results end where there are no more; copies know it."""
    batch, kv_heads, rows, size = queries.shape
    programs = batch * kv_heads * spec.splits * spec.stretches
    lines = plgpu.TilingTransform((_SUBROWS, _CHUNK)), plgpu.SwizzleTransform(128)
    scratch = {
        "held": plgpu.SMEM((spec.groups, _ROWS, size), queries.dtype, transforms=lines),
        "tiles": plgpu.SMEM((spec.stages, spec.tile, 2 * size), cache.dtype, transforms=lines),
        "asked": plgpu.Barrier(num_barriers=spec.groups),
        "here": plgpu.Barrier(num_barriers=spec.stages),
        "done": plgpu.Barrier(num_arrivals=spec.groups, num_barriers=spec.stages),
        "cleared": plgpu.Barrier(num_arrivals=spec.groups),
    }
    if spec.interpreted:
        shape = (spec.groups, _ROWS, spec.tile)
        scratch["weights"] = plgpu.SMEM(shape, queries.dtype, transforms=lines)
    return plgpu.kernel(
        functools.partial(_kernel, spec=spec),
        out_type=(
            jax.ShapeDtypeStruct((batch, kv_heads, spec.splits, rows, size), queries.dtype),
            jax.ShapeDtypeStruct((batch, kv_heads, spec.splits, edges.shape[3]), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(programs,),
        grid_names=("program",),
        num_threads=spec.groups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        kernel_name="block_attention_decode",
        interpret=interpret,
    )(layer, numbers, edges, queries, own, cache)


def _kernel(layer, numbers, edges, queries, own, cache, out, lse, *, spec: _Spec, **scratch):
    # Stretches of the same tiles run beside each other: the second finds them in the L2 cache.
    at, stretch = _divided(lax.axis_index("program"), spec.stretches)
    at, split = _divided(at, spec.splits)
    row, head = _divided(at, cache.shape[2])
    me, of_layer = lax.axis_index("warpgroup"), layer[0]
    mine = pl.ds(stretch * spec.rows + me * _ROWS, _ROWS)

    def number(i):
        return numbers[row, stretch, i]

    items = number(shares.UNTIL + 3)
    start = lax.div(split * items, jnp.int32(spec.splits))
    steps = lax.div((split + 1) * items, jnp.int32(spec.splits)) - start
    tiles, here, done = scratch["tiles"], scratch["here"], scratch["done"]

    def tile_of(step):
        """The kind of keys of a step of this program, and the first of them."""
        item = start + step
        run = sum((item >= number(shares.UNTIL + i)).astype(jnp.int32) for i in range(3))
        return lax.div(run, jnp.int32(2)), (item + number(shares.SHIFT + run)) * spec.tile

    def ask(step, slot):
        kind, key = tile_of(step)
        keys = pl.ds(key, spec.tile)

        @pl.when(kind == shares.CACHED)
        def _():
            source = cache.at[of_layer, row, head, keys]
            plgpu.copy_gmem_to_smem(source, tiles.at[slot], here.at[slot])

        @pl.when(kind == shares.OWN)
        def _():
            plgpu.copy_gmem_to_smem(own.at[row, head, keys], tiles.at[slot], here.at[slot])

    plgpu.copy_gmem_to_smem(
        queries.at[row, head, mine], scratch["held"].at[me], scratch["asked"].at[me]
    )
    for step in range(spec.stages):
        pl.when((me == 0) & (step < steps))(functools.partial(ask, jnp.int32(step), step))
    plgpu.barrier_wait(scratch["asked"].at[me])

    def update(step, state):
        slot = lax.rem(step, jnp.int32(spec.stages))
        following = step - 1 + spec.stages

        @pl.when((me == 0) & (step > 0) & (following < steps))
        def _():
            free = lax.rem(following, jnp.int32(spec.stages))
            plgpu.barrier_wait(done.at[free])
            ask(following, free)

        plgpu.barrier_wait(here.at[slot])
        kind, key = tile_of(step)
        state = _update(
            spec, state, scratch, slot, kind, key, number, edges.at[row, kind, :, mine], me
        )
        plgpu.barrier_arrive(done.at[slot])
        return state

    rows = plgpu.Layout.WGMMA.reduce(1)
    acc = plgpu.layout_cast(jnp.zeros((_ROWS, spec.size), jnp.float32), plgpu.Layout.WGMMA)
    top = plgpu.layout_cast(jnp.full((_ROWS,), -jnp.inf, jnp.float32), rows)
    total = plgpu.layout_cast(jnp.zeros((_ROWS,), jnp.float32), rows)
    acc, top, total = lax.fori_loop(0, steps, update, (acc, top, total))

    # Who has seen nothing to the end has the maximum of masked scores. Nothing of a tile that a
    # query does not see counts once it has seen something: the larger maximum takes it to zero.
    seen = top > _NEG * spec.times
    share = jnp.where(seen, 1 / total, 0.0)
    result = scratch["held"].at[me]
    result[...] = (acc * lax.broadcast_in_dim(share, acc.shape, [0])).astype(result.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(result, out.at[row, head, split, mine])
    sums = jnp.where(seen, (top + jnp.log2(total)) / _LOG2E, -jnp.inf)
    lse[row, head, split, mine] = sums
    plgpu.wait_smem_to_gmem(0)


def _update(spec: _Spec, state, scratch, slot, kind, key, number, edges, me):
    """The running softmax goes on over a tile, whose first key is `key`."""
    acc, top, total = state
    tile = scratch["tiles"].at[slot]
    keys, values = tile.at[:, : spec.size], tile.at[:, spec.size :]

    def products(acc):
        plgpu.wgmma(acc, scratch["held"].at[me], keys.transpose((1, 0)))
        return acc[...]

    scores = pl.run_scoped(products, plgpu.ACC((_ROWS, spec.tile), jnp.float32))
    if spec.soft_cap:
        # A tanh by exponentials: that of the chip is good to three digits.
        scores = 1 - 2 / (jnp.exp2(scores * (2 * _LOG2E * spec.scale / spec.soft_cap)) + 1)

    whole = [number(shares.WHOLE + kind * 4 + i) for i in range(4)]
    cut = ~shares.inside(key, key + spec.tile, whole)

    def masked(scores):
        place = key + plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
        bounds = [
            lax.broadcast_in_dim(
                plgpu.layout_cast(edges[i], plgpu.Layout.WGMMA.reduce(1)),
                scores.shape, [0],
            )
            for i in range(4)
        ]  # fmt: skip
        return jnp.where(shares.inside(place, place + 1, bounds), scores, _NEG)

    scores = lax.cond(cut, masked, lambda scores: scores, scores)

    @pl.when(cut)
    def _():
        read = [number(shares.READ + kind * 4 + i) for i in range(4)]
        _clear(spec, values, key, read, me)
        plgpu.commit_smem()
        if spec.groups > 1:
            plgpu.barrier_arrive(scratch["cleared"])
            plgpu.barrier_wait(scratch["cleared"])

    most = jnp.maximum(top, scores.max(axis=1) * spec.times)
    shrink = jnp.exp2(top - most)
    weights = jnp.exp2(scores * spec.times - lax.broadcast_in_dim(most, scores.shape, [0]))
    total = total * shrink + weights.sum(axis=1)
    acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
    return _mixed(spec, acc, weights.astype(tile.dtype), values, scratch, me), most, total


def _clear(spec: _Spec, values, key, read, me):
    """A key that nobody reads may hold anything, and 0 * NaN is NaN: clears its values."""
    shape = (spec.tile, _CHUNK)
    place = key + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
    for i in range(spec.size // _CHUNK):

        @pl.when(me == i % spec.groups)
        def _(i=i):
            part = values.at[:, i * _CHUNK : (i + 1) * _CHUNK]
            found = plgpu.layout_cast(part[...], plgpu.Layout.WGMMA)
            part[...] = jnp.where(
                shares.inside(place, place + 1, read), found, jnp.zeros_like(found)
            )


def _mixed(spec: _Spec, acc, weights, values, scratch, me):
    """`acc` and the values weighed."""
    if spec.interpreted:  # which has neither products of registers nor accumulators that go on
        part = scratch["weights"].at[me]
        part[...] = weights
        plgpu.commit_smem()

        def product(acc):
            plgpu.wgmma(acc, part, values)
            return acc[...]

        return acc + pl.run_scoped(product, plgpu.ACC(acc.shape, jnp.float32))
    return pl.run_state(lambda ref: plgpu.wgmma(ref, weights, values))(plgpu.ACC.init(acc))


def _divided(x, by: int):
    return lax.div(x, jnp.int32(by)), lax.rem(x, jnp.int32(by))


def _by_head(q, kv_heads: int) -> jax.Array:
    """[B, Q, N, H] as [B, K, rows, H]: the queries of a kv head, all its query heads together."""
    batch, entries, heads, size = q.shape
    q = jnp.moveaxis(q.reshape(batch, entries, kv_heads, heads // kv_heads, size), 2, 1)
    q = q.reshape(batch, kv_heads, -1, size)
    return _padded(q, 2, _multiple(q.shape[2], _SUBROWS))


def _by_entry(x, entries: int, group: int) -> jax.Array:
    """[B, K, rows, X] as [B, Q, N, X]."""
    batch, kv_heads, _, width = x.shape
    x = x[:, :, : entries * group].reshape(batch, kv_heads, entries, group, width)
    return jnp.moveaxis(x, 1, 2).reshape(batch, entries, kv_heads * group, width)


def _own(k, v) -> jax.Array:
    """The entries' own keys and values as the cache has them, [B, K, Q, 2 * H]."""
    return jnp.moveaxis(jnp.concatenate([k, v.astype(k.dtype)], axis=3), 2, 1)


def _merged(out, lse):
    """Results over shares of the keys, [B, K, splits, rows, H] and [B, K, splits, rows], as one."""
    lse = lse[..., : out.shape[3]]
    if out.shape[2] == 1:
        return out[:, :, 0], lse[:, :, 0]
    top = jnp.maximum(lse.max(axis=2, keepdims=True), _NEG)  # finite, where nothing is seen
    weights = jnp.exp(lse - top)
    total = weights.sum(axis=2)
    mixed = (out.astype(jnp.float32) * weights[..., None]).sum(axis=2)
    mixed = mixed / jnp.maximum(total, 1e-37)[..., None]
    return mixed.astype(out.dtype), top[:, :, 0] + jnp.log(total)


def _padded(x, axis: int, length: int, mode: str = "constant") -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths, mode=mode)


def _multiple(x: int, step: int) -> int:
    return -(-x // step) * step
