"""The gradient of the cross-entropy on TPU: the scores of a tile are made again, and stay in VMEM.

    of the hidden states   grid (blocks of rows, tiles of the vocabulary), the tiles innermost
    of the vocabulary      grid (tiles of the vocabulary, blocks of rows), the rows innermost
    each step              slope [Rb, tile] of the scores, then its product with the other side's
                           vectors, summed in VMEM in float32 and written once

With the forward pass, the scores are made three times: two products more than where they are kept,
the price of moving none of them through memory.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_LANES = 128
_VMEM = 40 << 20  # what a step may hold, by the estimate of `block_for`
_SIDES = 512, 256, 128


def block_for(dim: int, itemsize: int) -> int:
    """Rows of a block and tokens of a tile: the most that fit.

    Of each element of `side` vectors there are two in, two out, two of the other side and a sum.
    """
    held = lambda side: side * dim * (6 * itemsize + 4) + 16 * side**2  # noqa: E731
    return next((side for side in _SIDES if held(side) <= _VMEM), _SIDES[-1])


def slopes(
    hidden, vocabulary, bias, targets, first, log_z, d_log_z, d_own, *, soft_cap=0.0,
    forbidden=(), tile=None, interpret=False,
):  # fmt: skip
    """Gradients of the hidden states, the vocabulary and the bias (if any), in their dtypes.

    Args:
      hidden, vocabulary, bias: [R, D], [V, D], [V] or None.
      targets: int32[R], ids of the whole vocabulary; not all need be among these tokens.
      first: int32[], id of the first token here.
      log_z, d_log_z, d_own: float32[R], and the gradients of it and of the target's score.
      tile: tokens of a tile, a multiple of 128; by default what fits.
    """
    count, dim = hidden.shape
    size, dtype = len(vocabulary), hidden.dtype
    wide = jnp.promote_types(dtype, vocabulary.dtype).itemsize
    side = block_for(dim, wide)
    tile = min(tile or side, -(-size // _LANES) * _LANES)
    rows = min(side, -(-count // 16) * 16)
    padded = -(-count // rows) * rows
    over_rows = lambda x: jnp.pad(x, ((0, padded - count), (0, 0)))  # noqa: E731
    operands = [
        over_rows(hidden),
        vocabulary.astype(dtype),
        over_rows(jnp.stack([log_z, d_log_z, d_own], axis=1)),
        over_rows((targets - first).astype(jnp.int32)[:, None]),
    ]
    if bias is not None:
        operands.append(bias.astype(jnp.float32)[None])
    options = {
        "has_bias": bias is not None, "size": size, "tile": tile, "soft_cap": soft_cap,
        "forbidden": tuple(forbidden),
    }  # fmt: skip
    blocks, tiles = padded // rows, -(-size // tile)

    def call(kernel, grid, at, out_shape, out_specs, sums, name):
        """`at` tells the number of the block of rows and of the tile from a step's indices."""
        row, token = (lambda *g: (at(*g)[0], 0)), (lambda *g: (at(*g)[1], 0))
        specs = [
            pl.BlockSpec((rows, dim), row), pl.BlockSpec((tile, dim), token),
            pl.BlockSpec((rows, 3), row), pl.BlockSpec((rows, 1), row),
        ]  # fmt: skip
        if bias is not None:
            specs.append(pl.BlockSpec((1, tile), lambda *g: (0, at(*g)[1])))
        return pl.pallas_call(
            partial(kernel, **options),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1, grid=grid, in_specs=specs, out_specs=out_specs,
                scratch_shapes=[pltpu.VMEM(sums, jnp.float32)],
            ),
            out_shape=out_shape,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=64 << 20
            ),
            cost_estimate=pl.CostEstimate(
                flops=4 * padded * size * dim, transcendentals=padded * size,
                bytes_accessed=(size * blocks + padded * tiles) * dim * dtype.itemsize,
            ),
            interpret=interpret,
            name=name,
        )(jnp.asarray(first, jnp.int32)[None], *operands)  # fmt: skip

    d_hidden = call(
        _of_hidden, (blocks, tiles), lambda i, j, _: (i, j),
        jax.ShapeDtypeStruct((padded, dim), dtype),
        pl.BlockSpec((rows, dim), lambda i, j, _: (i, 0)), (rows, dim), "cross_entropy_d_hidden",
    )  # fmt: skip
    d_vocabulary, *d_bias = call(
        _of_vocabulary, (tiles, blocks), lambda j, i, _: (i, j),
        [jax.ShapeDtypeStruct((size, dim), vocabulary.dtype)]
        + ([jax.ShapeDtypeStruct((1, size), jnp.float32)] if bias is not None else []),
        [pl.BlockSpec((tile, dim), lambda j, i, _: (j, 0))]
        + ([pl.BlockSpec((1, tile), lambda j, i, _: (0, j))] if bias is not None else []),
        (tile, dim), "cross_entropy_d_vocabulary",
    )  # fmt: skip
    return (
        d_hidden[:count], d_vocabulary, None if bias is None else d_bias[0][0].astype(bias.dtype)
    )  # fmt: skip


def _of_hidden(first_ref, hidden_ref, vectors_ref, numbers_ref, targets_ref, *refs, has_bias, size,
               tile, **options):  # fmt: skip
    bias_ref = refs[0] if has_bias else None
    out_ref, sum_ref = refs[-2:]
    step = pl.program_id(1)
    vectors = vectors_ref[...]
    if size % tile:  # what lies behind the last token may be anything
        token = step * tile + jax.lax.broadcasted_iota(jnp.int32, (tile, 1), 0)
        vectors = jnp.where(token < size, vectors, jnp.zeros_like(vectors))
    slope = _slope(
        first_ref[0], step * tile, hidden_ref[...], vectors, numbers_ref, targets_ref, bias_ref,
        size=size, **options,
    )  # fmt: skip
    _add(sum_ref, step, _dot(slope.astype(vectors.dtype), vectors, 1, 0))

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _of_vocabulary(first_ref, hidden_ref, vectors_ref, numbers_ref, targets_ref, *refs, has_bias,
                   size, tile, **options):  # fmt: skip
    refs = list(refs)
    bias_ref = refs.pop(0) if has_bias else None
    out_ref, sum_ref = refs[0], refs[-1]
    step = pl.program_id(1)
    hidden = hidden_ref[...]
    slope = _slope(
        first_ref[0], pl.program_id(0) * tile, hidden, vectors_ref[...], numbers_ref, targets_ref,
        bias_ref, size=size, **options,
    )  # fmt: skip
    if has_bias:
        _add(refs[1], step, slope.sum(axis=0, keepdims=True))
    _add(sum_ref, step, _dot(slope.astype(hidden.dtype), hidden, 0, 0))

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _slope(first, start, hidden, vectors, numbers_ref, targets_ref, bias_ref, *, size, soft_cap,
           forbidden):  # fmt: skip
    """The gradient of a tile's scores before their bias and cap, float32[Rb, tile]."""
    scores = _dot(hidden, vectors, 1, 1)
    if bias_ref is not None:
        scores = scores + bias_ref[...]
    if soft_cap:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    log_z, d_log_z, d_own = (numbers_ref[:, c : c + 1] for c in range(3))
    place = start + jax.lax.broadcasted_iota(jnp.int32, (1, scores.shape[1]), 1)
    # No score is above log Z, but for those of the rows and tokens that fill up a block.
    slope = jnp.exp(jnp.minimum(scores - log_z, 0.0)) * d_log_z
    for one in forbidden:
        slope = jnp.where(first + place == one, 0.0, slope)
    slope = slope + jnp.where(place == targets_ref[...], d_own, 0.0)
    if soft_cap:
        slope = slope * (1 - (scores / soft_cap) ** 2)
    return jnp.where(place < size, slope, 0.0)


def _add(ref, step, own) -> None:
    """Adds to a sum, which the first step begins."""

    @pl.when(step == 0)
    def _():
        ref[...] = own

    @pl.when(step > 0)
    def _():
        ref[...] += own


def _dot(a, b, axis: int, other: int):
    """The product over axis `axis` of `a` and `other` of `b`, in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((axis,), (other,)), ((), ())), precision=precision,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
