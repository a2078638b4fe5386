"""Token statistics on Hopper GPUs: the vocabulary streams through shared memory once.

    grid (blocks of rows, ranges of the vocabulary): a program on each multiprocessor
    program: one warpgroup fetches slabs, 64 numbers of hidden states and of a tile's vectors (TMA)
             two multiply them (wgmma), and bring the scores of a tile into the running numbers

Scores stay in registers. The numbers of the ranges become one by a few small operations of XLA.
"""

from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.token_stats.noise import random_bits
from pallas_kernels.token_stats.partial import LOWEST, Mass, Partial, Race

_SLAB = 64  # numbers of a vector that travel together: 128 bytes, the widest swizzle
_ROWS = 64  # of a warpgroup: those of one wgmma
_BOX = 8  # rows that TMA brings into the order of wgmma: arrays are of whole ones
_GROUPS = 2  # warpgroups that compute; one more fetches
_TOP = 4  # the most of the largest scores that are kept
_SHARED = 216 << 10  # bytes of slabs on their way, and of scores
_PIECE = 16  # tokens whose numbers are in the making at a time: they need registers
_BEHIND = 0x7FFFFFFF  # an id behind all others
_PER_ROW, _PER_TOKEN = (plgpu.Layout.WGMMA.reduce(axis) for axis in (1, 0))


class _Plan(NamedTuple):
    """How the work is cut."""

    rows: int  # of a block: those that a program has
    tile: int  # tokens of a tile
    own: int  # tokens of a tile that one warpgroup multiplies
    blocks: int  # of rows
    programs: int  # that share the blocks, and the vocabulary for each block


class _Running(NamedTuple):
    """What a warpgroup knows of its 64 rows so far. The largest score is `best[0]`."""

    best: tuple[jax.Array, ...]  # float32[64] each, in order
    ids: tuple[jax.Array, ...]  # int32[64]
    mass: tuple[jax.Array, jax.Array]  # float32[64]: total, spread
    hot: tuple[jax.Array, jax.Array] | None = None
    race: tuple[jax.Array, jax.Array, jax.Array] | None = None  # value, id, score


def takes(hidden, vocabulary, tile=None, *, top: int = 1, soft: bool = False) -> str | None:
    """None where the kernel takes such arguments; else why not, in a line."""
    if jax.__version_info__ < (0, 11):
        return f"JAX is {jax.__version__}; the kernel needs 0.11"
    if tile is not None:
        return "the kernel chooses its tile"
    for name, array in (("hidden states", hidden), ("vectors", vocabulary)):
        if array.dtype != jnp.bfloat16:
            return f"{name} are {array.dtype}; the kernel takes bfloat16"
    if hidden.shape[1] % _SLAB:
        return f"vectors of {hidden.shape[1]} are no multiple of {_SLAB}"
    if len(vocabulary) < 256 or len(vocabulary) % _BOX:
        return f"a vocabulary of {len(vocabulary)} is less than a tile, or no multiple of {_BOX}"
    if top > _TOP:
        return f"top={top} is more than the {_TOP} that fit into registers"
    return "the kernel forms no mean vector" if soft else None


def stats(
    hidden, vocabulary, *, first=0, bias=None, scale=None, soft_cap=0.0, forbidden=(), top=1,
    keys=None, temperature=None, soft=False, active=None, tile=None, programs=None,
    interpret=None,
) -> Partial:  # fmt: skip
    """As `reference.partial_stats`; `bias` [v], `scale` and `temperature` [R, 1].

    Args:
      active: bool[R], rows that need an answer: blocks of others alone are left out, and what is
        said of rows that are not active means nothing.
      soft, tile: not taken.
      programs: that run at once; by default the multiprocessors of the device.
      interpret: `mosaic_gpu.InterpretGPUParams`, to run without a GPU.
    """
    if reason := takes(hidden, vocabulary, tile, top=top, soft=soft):
        raise ValueError(f"the GPU kernel does not take this: {reason}")
    count = len(hidden)
    size = len(vocabulary)
    plan = _planned(count, size, programs or _multiprocessors(), keys is None and top == 1)
    padded, blocks, place = plan.blocks * plan.rows, plan.blocks, None
    if active is not None and blocks > 1:
        order = jnp.argsort(~active, stable=True)
        place = jnp.maximum(jnp.cumsum(active) - 1, 0)
        blocks = jnp.maximum(-(-active.sum(dtype=jnp.int32) // plan.rows), 1)
        hidden, scale, keys, temperature = jax.tree.map(
            lambda x: x[order], (hidden, scale, keys, temperature)
        )

    def over_rows(x, fill=0):
        return jnp.pad(x, ((0, padded - count), (0, 0)), constant_values=fill)

    operands = {"first": jnp.asarray(first, jnp.int32)[None]}
    if place is not None:
        operands["blocks"] = blocks[None]
    if bias is not None:
        behind = -size % plan.tile
        operands["bias"] = jnp.pad(bias.astype(jnp.float32), (0, behind))
    if scale is not None:
        operands["scale"] = over_rows(scale.astype(jnp.float32))[:, 0]
    if keys is not None and temperature is not None:
        keys = over_rows(keys)
        operands["key0"], operands["key1"] = keys[:, 0], keys[:, 1]
        operands["cool"] = over_rows(1 / temperature.astype(jnp.float32), 1)[:, 0]
    drawn = "cool" in operands

    scores = []
    if drawn:
        shape = (_GROUPS, plan.own // _PIECE, _ROWS, _PIECE)
        scores = [plgpu.SMEM(shape, jnp.float32)]
    stages = (_SHARED - 4 * drawn * _GROUPS * _ROWS * plan.own) // (
        (plan.rows + plan.tile) * _SLAB * hidden.dtype.itemsize
    )
    swizzled = (plgpu.TilingTransform((8, _SLAB)), plgpu.SwizzleTransform(128))
    ring = lambda height: plgpu.SMEM(  # noqa: E731
        (stages, height, _SLAB), hidden.dtype, transforms=swizzled
    )
    shared = plan.tile // plan.own  # warpgroups that each have a part of the tokens
    parts = plan.programs // (1 if place is not None else blocks) * shared
    numbers = jax.ShapeDtypeStruct((parts, top + 2 + 5 * drawn, padded), jnp.float32)
    ids = jax.ShapeDtypeStruct((parts, top + drawn, padded), jnp.int32)
    found = plgpu.kernel(
        partial(
            _kernel, plan=plan, size=size, top=top, soft_cap=soft_cap, forbidden=tuple(forbidden)
        ),
        out_type=[numbers, ids],
        scratch_types=[
            ring(plan.rows), ring(plan.tile), plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=_GROUPS, num_barriers=stages), *scores,
        ],
        grid=(plan.programs,), grid_names=("program",),
        num_threads=_GROUPS + 1, thread_name="group",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpret, kernel_name="token_stats",
    )(operands, jnp.pad(hidden, ((0, -count % _BOX), (0, 0))), vocabulary)  # fmt: skip
    merged = _merged(*found, plan.programs // blocks * shared, top=top)
    return jax.tree.map(lambda x: x[:count] if place is None else x[place], merged)


def _multiprocessors() -> int:
    """Of the GPU that is compiled for; of an H100 where there is none."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.num_cores or 132
    return getattr(jax.devices()[0], "core_count", None) or 132


def _planned(count: int, size: int, programs: int, plain: bool) -> _Plan:
    """A vector is fetched once for 128 rows; of up to 64, the warpgroups share the tokens.

    Args:
      plain: whether no sample is asked, and one token: there are registers for a wider tile.
    """
    few = count <= _ROWS
    own = 256 if plain and not few else 128
    rows, tile = (_ROWS, _GROUPS * own) if few else (_GROUPS * _ROWS, own)
    blocks = -(-count // rows)
    ranges = max(min(programs // blocks, -(-size // tile)), 1)
    return _Plan(rows, tile, own, blocks, ranges * blocks)


def _kernel(
    operands, hidden_ref, vectors_ref, numbers_ref, ids_ref, hidden_ring, vectors_ring, full, free,
    scores_ref=None, *, plan, size, top, soft_cap, forbidden,
):  # fmt: skip
    group, program = jax.lax.axis_index("group"), jax.lax.axis_index("program")
    blocks = operands["blocks"][0] if "blocks" in operands else plan.blocks
    # Neighbours have the same tokens, of which one fetches for all, through the second-level cache.
    block, place = jax.lax.rem(program, blocks), jax.lax.div(program, blocks)
    ranges = jax.lax.div(jnp.int32(plan.programs), jnp.int32(blocks))
    tiles, slabs, stages = -(-size // plan.tile), hidden_ref.shape[1] // _SLAB, hidden_ring.shape[0]
    begin, end = (jnp.minimum(jax.lax.div(x * tiles, ranges), tiles) for x in (place, place + 1))

    @pl.when(group == _GROUPS)
    def _():
        plgpu.set_max_registers(24, action="decrease")

        steps = (end - begin) * slabs

        @pl.loop(0, steps + stages)  # the last ones wait until all is read
        def _(step):
            slot = jax.lax.rem(step, stages)
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))

            @pl.when(step < steps)
            def _():
                at = pl.ds(jax.lax.rem(step, slabs) * _SLAB, _SLAB)
                row, token = block * plan.rows, (begin + jax.lax.div(step, slabs)) * plan.tile
                for ref, start, height, ring in (
                    (hidden_ref, row, plan.rows, hidden_ring),
                    (vectors_ref, token, plan.tile, vectors_ring),
                ):
                    plgpu.copy_gmem_to_smem(
                        ref.at[pl.ds(start, height), at], ring.at[slot], full.at[slot]
                    )

    @pl.when(group < _GROUPS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        few = plan.tile > plan.own
        row, token = (0, group * plan.own) if few else (group * _ROWS, 0)
        at = pl.ds(block * plan.rows + row, _ROWS)
        of_rows = {
            name: plgpu.load(operands[name].at[at], layout=_PER_ROW, optimized=False)
            for name in ("scale", "key0", "key1", "cool")
            if name in operands
        }

        def add_tile(i, running):
            def multiplied(scores_ref):
                def multiply(slab, _):
                    step = i * slabs + slab
                    slot = jax.lax.rem(step, stages)
                    plgpu.barrier_wait(full.at[slot])
                    plgpu.wgmma(
                        scores_ref,
                        hidden_ring.at[slot, pl.ds(row, _ROWS)],
                        vectors_ring.at[slot, pl.ds(token, plan.own)].transpose((1, 0)),
                    )
                    plgpu.wgmma_wait(1)  # for the one before
                    before = jax.lax.rem(step + stages - 1, stages)
                    pl.when(slab > 0)(lambda: plgpu.barrier_arrive(free.at[before]))

                jax.lax.fori_loop(0, slabs, multiply, None)
                return scores_ref[...]

            scores = pl.run_scoped(multiplied, plgpu.ACC((_ROWS, plan.own), jnp.float32))
            plgpu.barrier_arrive(free.at[jax.lax.rem((i + 1) * slabs - 1, stages)])
            pieces = []
            for cut in range(0, plan.own, _PIECE):
                start = (begin + i) * plan.tile + token + cut
                own = scores[:, cut : cut + _PIECE]
                if "bias" in operands:
                    bias_ref = operands["bias"].at[pl.ds(start, _PIECE)]
                    bias = plgpu.load(bias_ref, layout=_PER_TOKEN, optimized=False)
                    own += _wide(bias, own, axis=1)
                if soft_cap:
                    own = soft_cap * jnp.tanh(own * (1 / soft_cap))
                if "scale" in of_rows:
                    own *= _wide(of_rows["scale"], own)
                places = start + _iota(own.shape)
                ids, barred = operands["first"][0] + places, places >= size
                for one in forbidden:
                    barred = barred | (ids == one)
                pieces.append((jnp.where(barred, LOWEST, own), ids))
            found = _added(running, pieces)
            if scores_ref is None:
                return found
            for j, (own, _) in enumerate(pieces):
                scores_ref[group, j] = own
            first = operands["first"][0] + (begin + i) * plan.tile + token
            return _drawn(running, found, scores_ref.at[group], first, of_rows)

        found = jax.lax.fori_loop(0, end - begin, add_tile, _nothing(top, "cool" in operands))
        part = place * (plan.tile // plan.own) + (group if few else 0)
        numbers, ids = [*found.best, *found.mass], [*found.ids]
        if found.hot is not None and found.race is not None:
            value, winner, score = found.race
            numbers += [*found.hot, value, score, _warmed(found.best[0], of_rows["cool"])]
            ids.append(winner)
        for ref, columns in ((numbers_ref, numbers), (ids_ref, ids)):
            for j, column in enumerate(columns):
                ref[part, j, at] = column


def _nothing(top: int, drawn: bool) -> _Running:
    """Of no token."""
    full = lambda x, dtype=jnp.float32: plgpu.layout_cast(jnp.full((_ROWS,), x, dtype), _PER_ROW)  # noqa: E731
    sums = full(0.0), full(0.0)
    return _Running(
        (full(LOWEST),) * top, (full(0, jnp.int32),) * top, sums,
        *((sums, (full(LOWEST), full(0, jnp.int32), full(LOWEST))) if drawn else ()),
    )  # fmt: skip


def _wide(x, like, axis=0):
    """Numbers of rows (or tokens, axis 1), at each score."""
    return jax.lax.broadcast_in_dim(x, like.shape, [axis])


def _iota(shape):
    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)


def _added(running: _Running, pieces) -> _Running:
    """The best and the sums with a tile's pieces, scores float32[64, t] and ids int32[64, t]."""
    best, best_ids, left = running.best, running.ids, pieces
    for rank in range(len(best)):
        value = reduce(jnp.maximum, (scores for scores, _ in left)).max(axis=1)
        winner = reduce(jnp.minimum, (_where(x, value, ids) for x, ids in left)).min(axis=1)
        best, best_ids = _inserted(best, best_ids, value, winner)
        if rank + 1 < len(best):
            left = [(jnp.where(ids == _wide(winner, ids), LOWEST, x), ids) for x, ids in left]
    total, spread = 0.0, 0.0
    for scores, _ in pieces:
        below = scores - _wide(best[0], scores)
        weights = jnp.exp(below)
        total, spread = total + weights, spread + weights * below
    mass = _summed(running.mass, running.best[0], best[0], total, spread)
    return running._replace(best=best, ids=best_ids, mass=mass)


def _drawn(running: _Running, found: _Running, scores_ref, first, of_rows) -> _Running:
    """The sums over the temperature, and the race for a sample, with a tile's scores in memory.

    A loop over pieces: in one piece, the code of the noise outgrows the instruction cache.
    """
    cool = of_rows["cool"]
    top = _warmed(found.best[0], cool)

    def add(j, so_far):
        total, spread, *best = so_far
        scores = plgpu.load(scores_ref.at[j], layout=plgpu.Layout.WGMMA, optimized=False)
        ids = first + j * _PIECE + _iota(scores.shape)
        warm = _warmed(scores, _wide(cool, scores))
        below = warm - _wide(top, warm)
        weights = jnp.exp(below)
        keys = (_wide(of_rows[name], ids) for name in ("key0", "key1"))
        values = warm + _gumbel(random_bits(*keys, ids.astype(jnp.uint32)))
        later = values > best[0]
        best = (jnp.where(later, x, y) for x, y in zip((values, ids, scores), best, strict=True))
        return total + weights, spread + weights * below, *best

    shape = scores_ref.shape[1:]
    full = lambda x, dtype=jnp.float32: plgpu.layout_cast(  # noqa: E731
        jnp.full(shape, x, dtype), plgpu.Layout.WGMMA
    )
    total, spread, values, ids, scores = jax.lax.fori_loop(
        0, scores_ref.shape[0], add,
        (full(0.0), full(0.0), full(LOWEST), full(_BEHIND, jnp.int32), full(LOWEST)),
    )  # fmt: skip
    hot = _summed(running.hot, _warmed(running.best[0], cool), top, total, spread)
    value = values.max(axis=1)
    winner = _where(values, value, ids).min(axis=1)
    score = jnp.where(ids == _wide(winner, ids), scores, LOWEST).max(axis=1)
    later = value > running.race[0]
    race = tuple(
        jnp.where(later, x, y) for x, y in zip((value, winner, score), running.race, strict=True)
    )
    return found._replace(hot=hot, race=race)


def _where(values, largest, ids):
    """The ids whose value is the largest of its row; elsewhere one behind all."""
    return jnp.where(values == _wide(largest, values), ids, jnp.int32(_BEHIND))


def _inserted(best, ids, value, winner):
    """The lists in order, with a newcomer behind its equals, without their last."""
    out = []
    for number, one in zip(best, ids, strict=True):
        ahead = value > number
        out.append((jnp.where(ahead, value, number), jnp.where(ahead, winner, one)))
        value, winner = jnp.where(ahead, number, value), jnp.where(ahead, one, winner)
    return tuple(zip(*out, strict=True))


def _warmed(scores, cool):
    """Over the temperature; what is barred stays finite."""
    return jnp.maximum(scores * cool, LOWEST)


def _summed(sums, before, top, total, spread):
    """The sums, whose largest score was `before`, with those of a tile below `top`, the new one."""
    shift = before - top
    keep = jnp.exp(shift)
    total = keep * sums[0] + total.sum(axis=1)
    spread = keep * (sums[1] + shift * sums[0]) + spread.sum(axis=1)
    some = top > LOWEST  # else every token is barred
    return jnp.where(some, total, 0.0), jnp.where(some, spread, 0.0)


def _gumbel(bits):
    """As `noise.gumbel_of`, with one logarithm less, and without log1p, which does not lower.

    For the share near one, log(1 - share) is that of the rounded difference plus what was rounded
    off, exact to the last digits of either.
    """
    whole = (bits >> jnp.uint32(1)).astype(jnp.int32)
    low = whole < (1 << 30)
    near = jnp.where(low, whole, jnp.int32(_BEHIND) - whole).astype(jnp.float32)
    share = (near + 0.5) * jnp.float32(2.0**-31)
    rest = 1.0 - share
    lost = (1.0 - rest) - share
    return -jnp.log(-(jnp.log(jnp.where(low, share, rest)) + jnp.where(low, 0.0, lost)))


def _merged(numbers, ids, parts, *, top: int) -> Partial:
    """Of the first `parts` of float32[P, n, R], int32[P, n, R]. The lowest id of equals wins."""
    if not isinstance(parts, int):  # the others were not written
        nothing = jnp.array([LOWEST] * top + [0, 0] + [0, 0, LOWEST, LOWEST, LOWEST], jnp.float32)
        there = jnp.arange(len(numbers))[:, None, None] < parts
        numbers = jnp.where(there, numbers, nothing[: numbers.shape[1], None])
    scores, tokens = numbers[:, :top], ids[:, :top]
    scores, tokens = (x.reshape(-1, x.shape[2]) for x in (scores, tokens))
    best, best_ids = [], []
    for _ in range(top):
        value, winner, _ = _winner(scores, tokens)
        best.append(value)
        best_ids.append(winner)
        scores = jnp.where(tokens == winner, LOWEST, scores)
    sums = numbers[:, top:]
    mass = _together(numbers[:, 0], sums[:, 0], sums[:, 1])
    hot = race = None
    if sums.shape[1] > 2:
        _, _, hot_total, hot_spread, value, score, hot_top = jnp.moveaxis(sums, 1, 0)
        hot = _together(hot_top, hot_total, hot_spread)
        race = Race(*_winner(value, ids[:, top], score))
    return Partial(mass, jnp.stack(best, axis=1), jnp.stack(best_ids, axis=1), hot, race)


def _winner(values, ids, scores=None):
    """The largest value of each row, [P, R], the lowest id that has it, and that one's score."""
    value = values.max(axis=0)
    winner = jnp.where(values == value, ids, _BEHIND).min(axis=0)
    own = None if scores is None else jnp.where(ids == winner, scores, LOWEST).max(axis=0)
    return value, winner, own


def _together(top, total, spread) -> Mass:
    """The sums of parts, float32[P, R] each."""
    most = top.max(axis=0)
    shift = jnp.maximum(top - most, -1e4)
    keep = jnp.exp(shift)
    return Mass(most, (keep * total).sum(axis=0), (keep * (spread + shift * total)).sum(axis=0))
