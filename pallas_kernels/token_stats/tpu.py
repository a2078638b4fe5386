"""Token statistics on TPU: the vocabulary streams through VMEM once, tile by tile.

    grid (blocks of rows, tiles of the vocabulary), the tiles innermost
    tile:  scores [Rb, tile] = hidden [Rb, D] . vectors [tile, D]   on the MXU
           running m, s, u; the k best; the Gumbel race; the mean vector   on the VPU

The running numbers lie in the output blocks, which stay in VMEM while the tiles go by. Scores never
leave it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.token_stats.noise import gumbel
from pallas_kernels.token_stats.partial import LOWEST, Mass, Partial, Race
from pallas_kernels.token_stats.rows import packing
from pallas_kernels.token_stats.tuned import tile_for

_ROWS = 256  # of a block: enough for the MXU, and the scores of a tile fit
_LANES = 128
_FLOOR = -1e4  # of exponents: e to it is zero, and it times zero is a number
# Columns of the running numbers
_M, _S, _U, _HOT_M, _HOT_S, _HOT_U, _VALUE, _SCORE, _SCALE = range(9)


def takes(hidden, vocabulary, tile: int | None = None) -> str | None:
    """None where the kernel takes such arguments; else why not, in a line."""
    if tile is not None and tile % _LANES:
        return f"tile={tile} is no multiple of {_LANES}"
    if hidden.dtype not in (jnp.bfloat16, jnp.float32):
        return f"hidden states are {hidden.dtype}; the kernel takes bfloat16 and float32"
    if hidden.shape[1] % _LANES:
        # XLA lays such vectors out with the tokens innermost, and would copy them for every call.
        return f"vectors of {hidden.shape[1]} do not fill registers of {_LANES} lanes"
    if len(vocabulary) < _LANES:
        return f"a vocabulary of {len(vocabulary)} is less than a tile"
    return None


def stats(
    hidden, vocabulary, *, first=0, bias=None, scale=None, soft_cap=0.0, forbidden=(), top=1,
    keys=None, temperature=None, soft=False, active=None, tile=None, interpret=False,
) -> Partial:  # fmt: skip
    """As `reference.partial_stats`; `bias` [v], `scale` and `temperature` [R, 1].

    Args:
      active: bool[R], rows that need an answer: blocks of others alone are left out.
      tile: tokens of a tile, a multiple of 128; `tuned.tile_for` by default.
    """
    count, dim = hidden.shape
    size, dtype = len(vocabulary), hidden.dtype
    vocabulary = vocabulary.astype(dtype)
    tile = tile or tile_for(dim, dtype)
    tile = min(tile, -(-size // _LANES) * _LANES)
    align = 16 if dtype == jnp.bfloat16 else 8
    rows = min(_ROWS, -(-count // align) * align)
    padded = -(-count // rows) * rows
    blocks, place = padded // rows, None
    if active is not None and blocks > 1:
        order, place, total = packing(active)
        blocks = (total + rows - 1) // rows
        hidden, scale, keys, temperature = jax.tree.map(
            lambda x: x[order], (hidden, scale, keys, temperature)
        )
    over_rows = lambda x: jnp.pad(x, ((0, padded - count), (0, 0)))  # noqa: E731

    operands, specs = [over_rows(hidden)], [pl.BlockSpec((rows, dim), lambda i, j, _: (i, 0))]
    operands.append(vocabulary)
    specs.append(pl.BlockSpec((tile, dim), lambda i, j, _: (j, 0)))
    has = {"bias": bias is not None, "scale": scale is not None, "keys": keys is not None}
    if bias is not None:
        operands.append(bias.astype(jnp.float32)[None])
        specs.append(pl.BlockSpec((1, tile), lambda i, j, _: (0, j)))
    if scale is not None:
        operands.append(over_rows(scale.astype(jnp.float32)))
        specs.append(pl.BlockSpec((rows, 1), lambda i, j, _: (i, 0)))
    if keys is not None and temperature is not None:
        operands += [over_rows(keys), jnp.pad(
            1 / temperature.astype(jnp.float32), ((0, padded - count), (0, 0)), constant_values=1.0
        )]  # fmt: skip
        specs += [
            pl.BlockSpec((rows, 2), lambda i, j, _: (i, 0)),
            pl.BlockSpec((rows, 1), lambda i, j, _: (i, 0)),
        ]
    block = pl.BlockSpec((rows, _LANES), lambda i, j, _: (i, 0))
    shape = partial(jax.ShapeDtypeStruct, (padded, _LANES))
    outs = [shape(jnp.float32), shape(jnp.int32), shape(jnp.float32), shape(jnp.int32)]
    out_specs = [block] * 4
    if soft:
        outs.append(jax.ShapeDtypeStruct((padded, dim), jnp.float32))
        out_specs.append(pl.BlockSpec((rows, dim), lambda i, j, _: (i, 0)))
    itemsize = jnp.dtype(dtype).itemsize
    found = pl.pallas_call(
        partial(
            _kernel, has=has, soft=soft, size=size, tile=tile, top=top, soft_cap=soft_cap,
            forbidden=tuple(forbidden),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(blocks, -(-size // tile)),
            in_specs=specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM((rows, tile), jnp.float32)],
        ),
        out_shape=outs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=64 << 20
        ),
        cost_estimate=pl.CostEstimate(
            flops=(4 if soft else 2) * padded * size * dim,
            transcendentals=(4 if keys is not None else 1) * padded * size,
            bytes_accessed=size * dim * itemsize * (padded // rows) + padded * dim * itemsize,
        ),
        interpret=interpret,
        name="token_stats",
    )(jnp.asarray(first, jnp.int32)[None], *operands)  # fmt: skip
    numbers, ids, best, best_ids, *vectors = (
        x[:count] if place is None else x[place] for x in found
    )
    hot = race = None
    if keys is not None:
        hot = Mass(numbers[:, _HOT_M], numbers[:, _HOT_S], numbers[:, _HOT_U])
        race = Race(numbers[:, _VALUE], ids[:, 0], numbers[:, _SCORE])
    return Partial(
        Mass(numbers[:, _M], numbers[:, _S], numbers[:, _U]), best[:, :top], best_ids[:, :top],
        hot, race, vectors[0] if soft else None,
    )  # fmt: skip


def _kernel(first_ref, hidden_ref, vectors_ref, *refs, has, soft, size, tile, top, soft_cap,
            forbidden):  # fmt: skip
    refs = list(refs)
    bias_ref = refs.pop(0) if has["bias"] else None
    scale_ref = refs.pop(0) if has["scale"] else None
    keys_ref, cool_ref = (refs.pop(0), refs.pop(0)) if has["keys"] else (None, None)
    numbers_ref, ids_ref, best_ref, best_ids_ref = refs[:4]
    soft_ref, left_ref = refs[4] if soft else None, refs[-1]
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        numbers_ref[...] = jnp.zeros_like(numbers_ref)
        for column in (_M, _HOT_M, _VALUE, _SCORE):
            numbers_ref[:, column : column + 1] = jnp.full_like(numbers_ref[:, :1], LOWEST)
        ids_ref[...] = jnp.zeros_like(ids_ref)
        best_ref[...] = jnp.full_like(best_ref, LOWEST)
        best_ids_ref[...] = jnp.zeros_like(best_ids_ref)
        if soft_ref is not None:
            soft_ref[...] = jnp.zeros_like(soft_ref)

    vectors = vectors_ref[...]
    place = step * tile + jax.lax.broadcasted_iota(jnp.int32, (1, tile), 1)
    if size % tile:  # what lies behind the last token may be anything
        column = step * tile + jax.lax.broadcasted_iota(jnp.int32, (tile, 1), 0)
        vectors = jnp.where(column < size, vectors, jnp.zeros_like(vectors))
    scores = jax.lax.dot_general(
        hidden_ref[...], vectors, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32,
        precision=_precision(vectors.dtype),
    )  # fmt: skip
    if bias_ref is not None:
        scores = scores + bias_ref[...]
    if soft_cap:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if scale_ref is not None:
        scores = scores * scale_ref[...]
    ids = first_ref[0] + place
    barred = place >= size
    for one in forbidden:
        barred = barred | (ids == one)
    scores = jnp.where(barred, LOWEST, scores)

    weights, keep = _add_mass(numbers_ref, _M, scores)
    if soft_ref is not None:
        soft_ref[...] = keep * soft_ref[...] + jnp.dot(
            weights.astype(vectors.dtype), vectors, preferred_element_type=jnp.float32,
            precision=_precision(vectors.dtype),
        )  # fmt: skip
    if keys_ref is not None and cool_ref is not None:
        warm = jnp.where(scores > LOWEST, scores * cool_ref[...], LOWEST)
        _add_mass(numbers_ref, _HOT_M, warm)
        _run_race(numbers_ref, ids_ref, keys_ref, scores, warm, ids)
    left_ref[...] = scores
    _keep_best(best_ref, best_ids_ref, left_ref, ids, top)


def _precision(dtype):
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _add_mass(ref, first: int, scores) -> tuple[jax.Array, jax.Array]:
    """Adds a tile to the sums in columns first, first + 1, first + 2.

    Returns:
      e^(z - m) of the tile, and the factor that brought the sums before to the new m.
    """
    before, total, spread = (ref[:, c : c + 1] for c in range(first, first + 3))
    top = jnp.maximum(before, scores.max(axis=1, keepdims=True))
    below = jnp.maximum(scores - top, _FLOOR)
    weights = jnp.where(scores > LOWEST, jnp.exp(below), 0.0)
    shift = jnp.maximum(before - top, _FLOOR)
    keep = jnp.exp(shift)
    ref[:, first : first + 1] = top
    ref[:, first + 1 : first + 2] = keep * total + weights.sum(axis=1, keepdims=True)
    ref[:, first + 2 : first + 3] = keep * (spread + shift * total) + (weights * below).sum(
        axis=1, keepdims=True
    )
    return weights, keep


def _run_race(numbers_ref, ids_ref, keys_ref, scores, warm, ids) -> None:
    """The tile's winner of the race for a sample against the one before."""
    noise = gumbel(keys_ref[:, :1], keys_ref[:, 1:2], ids.astype(jnp.uint32))
    value, winner, score = _first_largest(
        jnp.where(warm > LOWEST, warm + noise, LOWEST), ids, scores
    )
    better = value > numbers_ref[:, _VALUE : _VALUE + 1]
    for column, own in ((_VALUE, value), (_SCORE, score)):
        before = numbers_ref[:, column : column + 1]
        numbers_ref[:, column : column + 1] = jnp.where(better, own, before)
    ids_ref[:, :1] = jnp.where(better, winner, ids_ref[:, :1])


def _first_largest(values, ids, scores):
    """The largest value, the lowest id that has it, and that one's score, [Rb, 1] each."""
    most = values.max(axis=1, keepdims=True)
    there = values == most
    winner = jnp.where(there, ids, jnp.int32(0x7FFFFFFF)).min(axis=1, keepdims=True)
    score = jnp.where(there & (ids == winner), scores, LOWEST).max(axis=1, keepdims=True)
    return most, winner, score


def _keep_best(best_ref, best_ids_ref, left_ref, ids, top: int) -> None:
    """Moves scores of the tile into the list of the `top` best, the largest first, while any fits.

    The list is in order. A newcomer goes behind its equals, whose ids are lower.
    """
    lane = jax.lax.broadcasted_iota(jnp.int32, best_ref.shape, 1)

    def fits():
        worst = best_ref[:, top - 1 : top]
        return jnp.max(jnp.where(left_ref[...].max(axis=1, keepdims=True) > worst, 1, 0)) > 0

    def move(_):
        left, best, best_ids = left_ref[...], best_ref[...], best_ids_ref[...]
        value = left.max(axis=1, keepdims=True)
        winner = jnp.where(left == value, ids, jnp.int32(0x7FFFFFFF)).min(axis=1, keepdims=True)
        enters = value > best[:, top - 1 : top]
        place = jnp.where(best >= value, 1, 0).sum(axis=1, keepdims=True)
        for ref, old, own in ((best_ref, best, value), (best_ids_ref, best_ids, winner)):
            moved = jnp.where(lane == place, own, pltpu.roll(old, 1, 1))
            ref[...] = jnp.where(enters & (lane >= place), moved, old)
        left_ref[...] = jnp.where(ids == winner, LOWEST, left)
        return fits()

    jax.lax.while_loop(lambda more: more, move, fits())
