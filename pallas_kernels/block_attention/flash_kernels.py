"""The kernels of `flash_tpu`: attention over clean keys, and its gradient in one pass.

As in the kernel for decoding, scores stand as [keys, queries]: maxima and sums over keys need no
shuffle across lanes, and a query's numbers are one lane. What a query sees is a range of keys, two
numbers, and only the tiles that an end of such a range cuts are masked.

The backward pass makes the scores of each tile once. The gradients of all keys and values of a kv
head wait in vector memory until its queries are through, those of a query tile until its keys are.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_attention.flash_steps import CUT, FIRST, LAST, STEPPED, WHOLE, Steps

LANES = 128
LOG2E = math.log2(math.e)
MOST_VMEM = 48 << 20  # bytes there to ask for
MOST_SMEM = 3 << 18  # of the lists of steps, of the 1 MiB that there is
_LEAST_VMEM = 16 << 20  # granted without asking
_NEG = -0.7 * float(jnp.finfo(jnp.float32).max)
_BEHIND = 3  # parts between the scores of one and its values


class Spec(NamedTuple):
    """What is static in a call."""

    entries: int  # Q
    keys: int  # C
    group: int  # query heads of a kv head
    kv: int  # kv heads of a grid step
    size: int  # H
    tile_q: int
    tile_k: int
    part: int  # keys of one softmax update; divides `tile_k`
    item: int  # bytes of a number
    buffers: int = 2  # of the gradients of keys and values: with one, writing them takes its time
    low: bool = True  # whether some query does not see the first keys
    scale: float = 1.0
    soft_cap: float = 0.0

    @property
    def heads(self) -> int:
        """Query heads of a grid step."""
        return self.kv * self.group

    @property
    def steps(self) -> int:
        """Tiles, at most."""
        return -(-self.entries // self.tile_q) * -(-self.keys // self.tile_k)

    @property
    def pre_scale(self) -> float:
        """Of queries: products are then scores in base 2, or ready for the tanh, at no cost."""
        return self.scale * (1 / self.soft_cap if self.soft_cap else LOG2E)

    def vmem(self, gradient: bool = False) -> int:
        """Bytes of vector memory, about: what is in flight twice, and what an update holds."""
        width = -(-self.size // LANES) * LANES
        queries, keys = self.heads * self.tile_q * width, self.kv * self.tile_k * width
        numbers, scores = self.heads * 8 * self.tile_q, self.tile_k * self.tile_q
        kept = self.heads * self.tile_q * self.size + 2 * numbers
        if not gradient:
            return 2 * (2 * (queries + keys) * self.item + 4 * numbers) + 4 * (kept + 3 * scores)
        moved = (3 * queries + 2 * keys) * self.item + 4 * numbers
        held = 2 * self.kv * -(-self.keys // self.tile_k) * self.tile_k * width
        return 2 * moved + 4 * (kept + 5 * scores + self.buffers * held)


def forward(spec: Spec, steps: Steps, q, k, v, interpret):
    """The output [B, N, Qp, H] and, in base 2, the logarithm of each sum, float32 [B, N, 1, Qp].

    Args:
      q: [B, N, Qp, H], scaled.
      k, v: [B, K, Cp, H].
    """
    batch, heads, rows, size = q.shape
    queries, numbers, ranges, keys = _blocks(spec, steps)
    scratch = [(spec.heads, many, spec.tile_q) for many in (1, 8, size)]
    work = batch * heads * len(steps.query) * spec.tile_q * spec.tile_k
    return pl.pallas_call(
        functools.partial(_forward, spec=spec, steps=len(steps.query), rows=len(steps.flags)),
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, rows), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, heads // spec.heads, len(steps.query)),
            in_specs=[ranges, queries, keys, keys],
            out_specs=[queries, numbers(1)],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        compiler_params=_params(spec.vmem()),
        cost_estimate=pl.CostEstimate(
            flops=4 * work * size,
            transcendentals=work,
            bytes_accessed=2 * (q.size + work // (spec.tile_q * spec.group) * size) * spec.item,
        ),
        interpret=interpret,
        name="block_attention_flash",
    )(*_prefetched(steps), q, k, v)


def backward(spec: Spec, steps: Steps, q, k, v, d_out, sums, interpret):
    """Gradients of queries, in the dtype of `q`, and of keys and values, float32; as they are laid.

    Those of queries are of the unscaled ones; those of keys lack a factor, as queries were scaled.

    Args:
      q, d_out: [B, N, Qp, H]; queries scaled.
      k, v: [B, K, Cp, H].
      sums: float32 [B, N, 2, Qp]: logarithms of the sums in base 2, and what each query's slopes
        have in common.
    """
    batch, heads, _, size = q.shape
    queries, numbers, ranges, keys = _blocks(spec, steps)
    work = batch * heads * len(steps.query) * spec.tile_q * spec.tile_k
    all_keys = pl.BlockSpec(
        (None, spec.kv, *k.shape[2:]),
        lambda row, head, *_: (row, head, 0, 0),
        pipeline_mode=pl.Buffered(spec.buffers),
    )
    return pl.pallas_call(
        functools.partial(_backward, spec=spec, steps=len(steps.query), rows=len(steps.flags)),
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(k.shape, jnp.float32),
            jax.ShapeDtypeStruct(v.shape, jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, heads // spec.heads, len(steps.query)),
            in_specs=[ranges, queries, keys, keys, queries, numbers(2)],
            out_specs=[queries, all_keys, all_keys],
            scratch_shapes=[pltpu.VMEM((spec.heads, size, spec.tile_q), jnp.float32)],
        ),
        compiler_params=_params(spec.vmem(gradient=True)),
        cost_estimate=pl.CostEstimate(
            flops=10 * work * size,
            transcendentals=work,
            bytes_accessed=(3 * q.size + 2 * work // (spec.tile_q * spec.group) * size) * spec.item
            + 8 * k.size,
        ),
        interpret=interpret,
        name="block_attention_flash_backward",
    )(*_prefetched(steps), q, k, v, d_out, sums)


def _blocks(spec: Spec, steps: Steps):
    """What a step reads: its queries, so many numbers of each, their ranges, and its keys."""
    count, differ = len(steps.query), len(steps.flags) > 1

    def of_queries(row, head, step, query, *_):
        return row, head, query[step], 0

    def of_numbers(row, head, step, query, *_):
        return row, head, 0, query[step]

    def of_ranges(row, head, step, query, *_):
        return row * differ, 0, query[step]

    def of_keys(row, head, step, query, key, *_):
        return row, head, key[row * count * differ + step], 0

    return (
        pl.BlockSpec((None, spec.heads, spec.tile_q, spec.size), of_queries),
        lambda many: pl.BlockSpec((None, spec.heads, many, spec.tile_q), of_numbers),
        pl.BlockSpec((None, 2, spec.tile_q), of_ranges),
        pl.BlockSpec((None, spec.kv, spec.tile_k, spec.size), of_keys),
    )


def _prefetched(steps: Steps):
    """The lists, and the first operand: the ranges of queries, int32[R, 2, Qp]."""
    ranges = jnp.stack([steps.first, steps.end], axis=1)
    return jnp.asarray(steps.query), steps.key.reshape(-1), steps.flags.reshape(-1), ranges


def _params(vmem: int) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        vmem_limit_bytes=min(max(2 * vmem, _LEAST_VMEM), MOST_VMEM),
    )


def _forward(query, key, flags, ranges, q, k, v, out, lse, top, total, acc, *,
             spec: Spec, steps: int, rows: int):  # fmt: skip
    at = pl.program_id(2) + (pl.program_id(0) * steps if rows > 1 else 0)
    flag, slot = flags[at], key[at] * spec.tile_k

    @pl.when(flag & FIRST != 0)
    def _():
        top[...] = jnp.full_like(top, _NEG)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    def update(kind: int, i):
        """The running softmax of a head goes on over a tile."""
        parts = _parts(spec, kind)
        scores, weights, shrinks = [], [], []
        # The products of a part stand beside the softmax of another, which does not wait for them:
        # the compiler schedules in about the order that it is given.
        for p in range(len(parts) + _BEHIND):
            if p < len(parts):
                keys, seen = parts[p]
                scores.append(_scores(spec, k[i // spec.group, keys], q[i, seen]))
            if 1 <= p <= len(parts):
                keys, seen = parts[p - 1]
                x = _masked(spec, kind, scores[p - 1], slot + keys.start, ranges[:, seen])
                before = top[i, :, seen]
                most = jnp.maximum(before, x.max(axis=0, keepdims=True))
                x = jnp.exp2(x - most)
                shrink = jnp.exp2(before - most)
                top[i, :, seen] = most
                total[i, :, seen] = total[i, :, seen] * shrink + _sums(x)
                weights.append(x.astype(v.dtype))
                shrinks.append(shrink)
            if p >= _BEHIND:
                keys, seen = parts[p - _BEHIND]
                mixed = _dot(v[i // spec.group, keys], weights[p - _BEHIND], 0, 0)
                acc[i, :, seen] = acc[i, :, seen] * shrinks[p - _BEHIND] + mixed

    _by_kind(spec, flag, update)

    @pl.when(flag & LAST != 0)
    def _():
        def write(i):
            # Nothing of a tile that a query does not see counts once it has seen something: the
            # larger maximum takes it to zero. Who has seen nothing has the maximum of masked ones.
            sums = total[i].sum(axis=0, keepdims=True)
            seen = top[i] > _NEG
            out[i] = jnp.where(seen, acc[i] / sums, 0.0).T.astype(out.dtype)
            lse[i] = jnp.where(seen, top[i] + jnp.log2(sums), -jnp.inf)

        _each(spec.heads, write)


def _backward(query, key, flags, ranges, q, k, v, d_out, sums, dq, dk, dv, acc, *,
              spec: Spec, steps: int, rows: int):  # fmt: skip
    at = pl.program_id(2) + (pl.program_id(0) * steps if rows > 1 else 0)
    flag, slot = flags[at], pl.multiple_of(key[at] * spec.tile_k, spec.tile_k)

    @pl.when(pl.program_id(2) == 0)
    def _():
        dk[...] = jnp.zeros_like(dk)
        dv[...] = jnp.zeros_like(dv)

    @pl.when(flag & FIRST != 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    def update(kind: int, i):
        """What a tile adds to the gradients of a head."""
        parts, of = _parts(spec, kind), i // spec.group
        made, slopes = [], []
        for p in range(len(parts) + _BEHIND):
            if p < len(parts):
                keys, seen = parts[p]
                scores = _scores(spec, k[of, keys], q[i, seen])
                made.append((scores, _dot(v[of, keys], d_out[i, seen], 1, 1)))
            if 1 <= p <= len(parts):
                keys, seen = parts[p - 1]
                scores, slope = made[p - 1]
                x = _masked(spec, kind, scores, slot + keys.start, ranges[:, seen])
                weights = jnp.exp2(x - sums[i, :1, seen])
                slope = weights * (slope - sums[i, 1:, seen])
                if spec.soft_cap:
                    slope = slope * (1 - (scores / (spec.soft_cap * LOG2E)) ** 2)
                slopes.append((weights.astype(v.dtype), slope.astype(k.dtype)))
            if p >= _BEHIND:
                keys, seen = parts[p - _BEHIND]
                weights, slope = slopes[p - _BEHIND]
                rows = pl.ds(slot + keys.start, spec.part)
                dv[of, rows] += _dot(weights, d_out[i, seen], 1, 0)
                dk[of, rows] += _dot(slope, q[i, seen], 1, 0)
                acc[i, :, seen] += _dot(k[of, keys], slope, 0, 0)

    _by_kind(spec, flag, update)

    @pl.when(flag & LAST != 0)
    def _():
        def write(i):
            dq[i] = (acc[i] * spec.scale).T.astype(dq.dtype)

        _each(spec.heads, write)


def _by_kind(spec: Spec, flag, update):
    """`update(kind, head)` for the heads of a step, where its flag says that it reads a tile."""
    for kind in (WHOLE, CUT, STEPPED):
        if kind == STEPPED and (spec.tile_q != spec.tile_k or spec.part == spec.tile_k):
            continue

        @pl.when(flag & kind != 0)
        def _(kind=kind):
            _each(spec.heads, functools.partial(update, kind))


def _each(count: int, run):
    """`run(i)` for each of so many heads."""
    if count == 1:
        run(0)
    else:
        lax.fori_loop(0, count, lambda i, _: run(i), None)


def _parts(spec: Spec, kind: int) -> list[tuple[slice, slice]]:
    """The keys of a tile that are updated at once, and the queries that see some of them."""
    starts = range(0, spec.tile_k, spec.part)
    return [
        (slice(i, i + spec.part), slice(i if kind == STEPPED else 0, spec.tile_q)) for i in starts
    ]


def _scores(spec: Spec, keys, queries):
    """Scores in base 2, float32[keys, queries]."""
    scores = _dot(keys, queries, 1, 1)
    return jnp.tanh(scores) * (spec.soft_cap * LOG2E) if spec.soft_cap else scores


def _masked(spec: Spec, kind: int, scores, slot, ranges):
    """Scores of the keys from `slot` on, those that are not seen at least."""
    if kind == WHOLE:
        return scores
    key = lax.broadcasted_iota(jnp.int32, (spec.part, 1), 0) + slot
    seen = key < ranges[1:]
    if spec.low:
        seen &= key >= ranges[:1]
    return jnp.where(seen, scores, _NEG)


def _sums(weights):
    """Sums over the keys that are left apart by sublane, [8, queries]."""
    return weights.reshape(-1, 8, weights.shape[1]).sum(axis=0)


def _dot(a, b, axis: int, other: int):
    """The product over axis `axis` of `a` and `other` of `b`, in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((axis,), (other,)), ((), ())), precision=precision,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
