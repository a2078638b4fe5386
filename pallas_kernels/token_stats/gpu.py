"""Token statistics on Hopper GPUs: the vocabulary streams through shared memory once.

    a program on each multiprocessor: a block of rows, and a range of the vocabulary's tiles
    one warpgroup fetches slabs: 64 numbers of hidden states, and of a tile's vectors (TMA)
    two multiply them (wgmma), and bring the scores of a tile into their running numbers

Scores stay on the multiprocessor. The numbers of the ranges become one by a few small operations of
XLA. Programs of two blocks and one range get the vectors by one transfer, as a cluster.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.token_stats import gpu_running
from pallas_kernels.token_stats.gpu_running import BEHIND, PIECE, ROWS
from pallas_kernels.token_stats.partial import LOWEST, Mass, Partial, Race
from pallas_kernels.token_stats.rows import packing

_SLAB = 64  # numbers of a vector that travel together: 128 bytes, the widest swizzle
_BOX = 8  # rows that TMA brings into the order of wgmma: arrays are of whole ones
_GROUPS = 2  # warpgroups that compute; one more fetches
_TOP = 4  # the most of the largest scores that are kept
_BATCH = 128  # tokens whose scores are in shared memory at once, where there is a sample
_SHARED = 216 << 10  # bytes of slabs on their way, and of scores


class _Plan(NamedTuple):
    """How the work is cut."""

    rows: int  # of a block: those that a program has
    tile: int  # tokens of a tile
    own: int  # tokens of a tile that one warpgroup multiplies
    blocks: int  # of rows
    programs: int  # that share the blocks, and the vocabulary for each block
    together: int  # programs of a cluster

    @property
    def split(self) -> int:
        """Warpgroups between which the tokens of a tile are split; 1: the rows are."""
        return self.tile // self.own


def takes(hidden, vocabulary, tile=None, *, top: int = 1, soft: bool = False) -> str | None:
    """None where the kernel takes such arguments; else why not, in a line."""
    if jax.__version_info__ < (0, 12):
        return f"JAX is {jax.__version__}; the kernel needs 0.12"
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
    count, size, drawn = len(hidden), len(vocabulary), keys is not None and temperature is not None
    plan = _planned(count, size, programs or _multiprocessors(), top)
    padded = plan.blocks * plan.rows
    live = place = None  # blocks that have active rows, and where an active row went
    if active is not None and plan.blocks > 1:
        order, place, some = packing(active)
        at_once = plan.rows * plan.together
        live = jnp.maximum(-(-some // at_once), 1) * plan.together
        hidden, scale, keys, temperature = jax.tree.map(
            lambda x: x[order], (hidden, scale, keys, temperature)
        )

    def over_rows(x, fill=0):
        return jnp.pad(x, ((0, padded - count), (0, 0)), constant_values=fill)

    operands = {"first": jnp.asarray(first, jnp.int32)[None]}
    if live is not None:
        operands["live"] = live[None]
    if bias is not None:
        operands["bias"] = jnp.pad(bias.astype(jnp.float32), (0, -size % plan.tile))
    if scale is not None:
        operands["scale"] = over_rows(scale.astype(jnp.float32))[:, 0]
    if keys is not None and temperature is not None:
        keys = over_rows(keys)
        operands["key0"], operands["key1"] = keys[:, 0], keys[:, 1]
        operands["cool"] = over_rows(1 / temperature.astype(jnp.float32), 1)[:, 0]

    parts = plan.split * (plan.programs if place is not None else plan.programs // plan.blocks)
    numbers, ids = plgpu.kernel(
        partial(
            _kernel, plan=plan, size=size, top=top, soft_cap=soft_cap, forbidden=tuple(forbidden)
        ),
        out_type=[
            jax.ShapeDtypeStruct((parts, top + 2 + 5 * drawn, padded), jnp.float32),
            jax.ShapeDtypeStruct((parts, top + drawn, padded), jnp.int32),
        ],
        scratch_types=_scratch(plan, hidden.dtype, drawn),
        grid=(plan.programs // plan.together,), grid_names=("cluster",),
        cluster=(plan.together,), cluster_names=("member",),
        num_threads=_GROUPS + 1, thread_name="group",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpret, kernel_name="token_stats",
    )(operands, jnp.pad(hidden, ((0, -count % _BOX), (0, 0))), vocabulary)  # fmt: skip
    if live is not None:
        numbers = _without(numbers, plan.programs // live * plan.split, top)
    merged = _merged(numbers, ids, top)
    return jax.tree.map(lambda x: x[:count] if place is None else x[place], merged)


def _multiprocessors() -> int:
    """Of the GPU that is compiled for; of an H100 where there is none."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.num_cores or 132
    return getattr(jax.devices()[0], "core_count", None) or 132


def _planned(count: int, size: int, programs: int, top: int) -> _Plan:
    """A vector is fetched once for 128 rows; of up to 64, the warpgroups share the tokens."""
    few = count <= ROWS
    own = 256 if top == 1 and not few else 128  # scores that registers hold, beside the best
    rows, tile = (ROWS, _GROUPS * own) if few else (_GROUPS * ROWS, own)
    blocks = -(-count // rows)
    ranges = max(min(programs // blocks, -(-size // tile)), 1)
    return _Plan(rows, tile, own, blocks, ranges * blocks, 1 if blocks % 2 else 2)


def _scratch(plan: _Plan, dtype, drawn: bool) -> list:
    """Rings of slabs, when a slab is there and when it is read, and the scores of a tile."""
    scores = (_GROUPS, _BATCH // PIECE, ROWS, PIECE) if drawn else (0,)
    slab = (plan.rows + plan.tile) * _SLAB * jnp.dtype(dtype).itemsize
    stages = (_SHARED - 4 * math.prod(scores)) // slab
    swizzled = (plgpu.TilingTransform((_BOX, _SLAB)), plgpu.SwizzleTransform(128))
    rings = [
        plgpu.SMEM((stages, height, _SLAB), dtype, transforms=swizzled)
        for height in (plan.rows, plan.tile)
    ]
    full = plgpu.Barrier(num_arrivals=len(rings), num_barriers=stages)
    if plan.together > 1:
        free = plgpu.ClusterBarrier(
            collective_axes=("member",), num_arrivals=_GROUPS, num_barriers=stages
        )
    else:
        free = plgpu.Barrier(num_arrivals=_GROUPS, num_barriers=stages)
    return [*rings, full, free, *([plgpu.SMEM(scores, jnp.float32)] if drawn else [])]


def _kernel(
    operands, hidden_ref, vectors_ref, numbers_ref, ids_ref, hidden_ring, vectors_ring, full, free,
    scores_ref=None, *, plan, size, top, soft_cap, forbidden,
):  # fmt: skip
    group = jax.lax.axis_index("group")
    program = jax.lax.axis_index("cluster") * plan.together + jax.lax.axis_index("member")
    # Neighbours have the same tokens: one fetches them for all, through the second-level cache.
    blocks = operands["live"][0] if "live" in operands else jnp.int32(plan.blocks)
    block, place = jax.lax.rem(program, blocks), jax.lax.div(program, blocks)
    ranges = jax.lax.div(jnp.int32(plan.programs), blocks)
    tiles, slabs, stages = -(-size // plan.tile), hidden_ref.shape[1] // _SLAB, hidden_ring.shape[0]
    # A program that is left over has none.
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
                rows = pl.ds(block * plan.rows, plan.rows)
                tokens = pl.ds((begin + jax.lax.div(step, slabs)) * plan.tile, plan.tile)
                plgpu.copy_gmem_to_smem(
                    hidden_ref.at[rows, at], hidden_ring.at[slot], full.at[slot]
                )
                plgpu.copy_gmem_to_smem(
                    vectors_ref.at[tokens, at], vectors_ring.at[slot], full.at[slot],
                    collective_axes="member" if plan.together > 1 else None,
                )  # fmt: skip

    @pl.when(group < _GROUPS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        row, token = (0, group * plan.own) if plan.split > 1 else (group * ROWS, 0)
        rows = pl.ds(block * plan.rows + row, ROWS)

        def of_rows(name):
            """Read again for each tile: registers are short."""
            return plgpu.layout_cast(operands[name][rows], gpu_running.PER_ROW)

        def multiplied(i):
            def all_slabs(sums):
                def multiply(slab, _):
                    step = i * slabs + slab
                    slot = jax.lax.rem(step, stages)
                    plgpu.barrier_wait(full.at[slot])
                    plgpu.wgmma(
                        sums,
                        hidden_ring.at[slot, pl.ds(row, ROWS)],
                        vectors_ring.at[slot, pl.ds(token, plan.own)].transpose((1, 0)),
                    )
                    plgpu.wgmma_wait(1)  # for the one before
                    before = jax.lax.rem(step + stages - 1, stages)
                    pl.when(slab > 0)(lambda: plgpu.barrier_arrive(free.at[before]))

                jax.lax.fori_loop(0, slabs, multiply, None)
                return sums[...]

            scores = pl.run_scoped(all_slabs, plgpu.ACC((ROWS, plan.own), jnp.float32))
            plgpu.barrier_arrive(free.at[jax.lax.rem((i + 1) * slabs - 1, stages)])
            return scores

        def finished(scores, start, scale):
            """Scores and ids of a piece that starts there."""
            if "bias" in operands:
                # Fewer than a cache line's, which is an error unless it is said to be meant. The
                # type checker sees the arguments of JAX 0.10.
                bias = plgpu.load(  # pyrefly: ignore[missing-argument]
                    operands["bias"].at[pl.ds(start, PIECE)], layout=gpu_running.PER_TOKEN,
                    optimized=False,
                )  # fmt: skip
                scores += gpu_running.wide(bias, scores, axis=1)
            if soft_cap:
                scores = soft_cap * jnp.tanh(scores * (1 / soft_cap))
            if scale is not None:
                scores *= gpu_running.wide(scale, scores)
            places = start + gpu_running.iota(scores.shape)
            ids, barred = operands["first"][0] + places, places >= size
            for one in forbidden:
                barred = barred | (ids == one)
            return jnp.where(barred, LOWEST, scores), ids

        def add_tile(i, running):
            scores, start = multiplied(i), (begin + i) * plan.tile + token
            scale = of_rows("scale") if "scale" in operands else None
            pieces = [
                finished(scores[:, cut : cut + PIECE], start + cut, scale)
                for cut in range(0, plan.own, PIECE)
            ]
            found = gpu_running.added(running, pieces)
            if scores_ref is None:
                return found
            sample, before, own = running.sample, running.best[0], scores_ref.at[group]
            for batch in range(0, len(pieces), own.shape[0]):
                for j, (scores, _) in enumerate(pieces[batch : batch + own.shape[0]]):
                    own[j] = scores
                first = operands["first"][0] + start + batch * PIECE
                sample = gpu_running.drawn(sample, before, found.best[0], own, first, of_rows)
                before = found.best[0]
            return found._replace(sample=sample)

        found = jax.lax.fori_loop(
            0, end - begin, add_tile, gpu_running.nothing(top, scores_ref is not None)
        )
        part = place * plan.split + (group if plan.split > 1 else 0)
        numbers, ids = [*found.best, found.total, found.spread], [*found.ids]
        if found.sample is not None:
            total, spread, value, winner, score = found.sample
            hottest = gpu_running.warmed(found.best[0], of_rows("cool"))
            numbers += [total, spread, value, score, hottest]
            ids.append(winner)
        for ref, columns in ((numbers_ref, numbers), (ids_ref, ids)):
            for j, column in enumerate(columns):
                ref[part, j, rows] = column


def _without(numbers, parts, top: int):
    """Parts behind the first ones were not written: nothing is what they say."""
    nothing = [LOWEST] * top + [0, 0] + [0, 0, LOWEST, LOWEST, LOWEST]
    nothing = jnp.array(nothing[: numbers.shape[1]], jnp.float32)[:, None]
    return jnp.where(jnp.arange(len(numbers))[:, None, None] < parts, numbers, nothing)


def _merged(numbers, ids, top: int) -> Partial:
    """Of all parts, float32[P, n, R] and int32[P, n, R], in any order: the lowest id of equals."""
    scores, tokens = (x[:, :top].reshape(-1, x.shape[2]) for x in (numbers, ids))
    best = []
    for _ in range(top):
        best.append(_winner(scores, tokens, scores))
        scores = jnp.where(tokens == best[-1].id, LOWEST, scores)
    mass = _together(numbers[:, 0], numbers[:, top], numbers[:, top + 1])
    hot = race = None
    if numbers.shape[1] > top + 2:
        total, spread, value, score, most = jnp.moveaxis(numbers[:, top + 2 :], 1, 0)
        hot, race = _together(most, total, spread), _winner(value, ids[:, top], score)
    values, winners = (jnp.stack(x, axis=1) for x in list(zip(*best, strict=True))[:2])
    return Partial(mass, values, winners, hot, race)


def _winner(values, ids, scores) -> Race:
    """The largest value of each row, [P, R], the lowest id that has it, and that one's score."""
    value = values.max(axis=0)
    winner = jnp.where(values == value, ids, BEHIND).min(axis=0)
    return Race(value, winner, jnp.where(ids == winner, scores, LOWEST).max(axis=0))


def _together(top, total, spread) -> Mass:
    """The sums of parts, float32[P, R] each."""
    most = top.max(axis=0)
    shift = jnp.maximum(top - most, -1e4)
    keep = jnp.exp(shift)
    return Mass(most, (keep * total).sum(axis=0), (keep * (spread + shift * total)).sum(axis=0))
