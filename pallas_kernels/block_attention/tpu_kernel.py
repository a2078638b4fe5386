"""The body of the TPU kernel of block attention: one step of one row, for one kv head.

Scores stand as [keys, queries], in base 2, and results as [H, queries].
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.block_attention import worklist
from pallas_kernels.masks import BlockMask

LANES = 128
LOG2E = math.log2(math.e)
_NEG = -0.7 * float(jnp.finfo(jnp.float32).max)
_BEHIND = 3  # parts between the scores of one and its values


class Spec(NamedTuple):
    """What is static in a call."""

    mask: BlockMask
    entries: int  # Q
    group: int  # query heads of a kv head
    size: int  # of a head as it lies in the cache: H, and padding
    own: int  # the entries' own keys, padded; 0 where they are left out
    rows: int  # queries of one softmax update
    stretches: int  # of so many queries
    tile: int
    part: int
    window: int
    hole: bool  # whether rows have one
    each: bool  # whether each query sees a stretch of the cache of its own
    widened: bool  # whether the cache is int8
    soft_cap: float

    @property
    def split(self) -> bool:
        """Whether keys and values are whole registers apart, and can be told apart for free."""
        return self.size % LANES == 0

    @property
    def height(self) -> int:
        """Query rows, padded."""
        return self.stretches * self.rows


def kernel(layer, row, source, tile, flags, bounds, *refs, spec: Spec):
    refs = list(refs)
    step = pl.program_id(1)
    at, flag = row[step], flags[step]
    # What a unit of the values that are summed stands for.
    unit = refs.pop(0)[pl.program_id(0), at] if spec.widened else None
    packed = refs.pop(0)
    limits = refs.pop(0) if spec.each else None
    cached, out, lse, *state = refs
    top = state[0]

    @pl.when(flag & worklist.FIRST != 0)
    def _():
        if spec.own:
            _each(top, lambda i: _own(spec, i, bounds[worklist.VALID, at], unit, packed, state))
        else:
            for ref, start in zip(state, (_NEG, 0.0, 0.0), strict=True):
                ref[...] = jnp.full(ref.shape, start, jnp.float32)

    for kind in (worklist.WHOLE, worklist.CUT):

        @pl.when(flag & kind != 0)
        def _(kind=kind):
            numbers = [bounds[i, at] for i in range(len(bounds))] if kind == worklist.CUT else None
            slot = tile[step] * spec.tile
            _each(top, lambda i: _cached(spec, i, slot, numbers, limits, packed, cached, state))

    @pl.when(flag & worklist.LAST != 0)
    def _():
        _each(top, lambda i: _write(i, unit, state, out, lse))


def _each(top, run):
    """`run(i)` for each of the stretches of query rows that are updated at once."""
    if top.shape[0] == 1:
        run(0)
    else:
        lax.fori_loop(0, top.shape[0], lambda i, _: run(i), None)


def _own(spec: Spec, i, valid, unit, packed, state):
    """The running softmax begins with the entries' own keys."""
    top, total, acc = state
    before = spec.height if spec.widened else 0  # queries that meet the cache
    pair = packed[before + spec.height :]
    keys, values = (pair[: spec.own], pair[spec.own :]) if spec.split else (pair, pair)
    scores = _scores(spec, keys, _queries(spec, i, packed, before))
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
    mixed = _mixed(spec, values, weights)
    top[i], total[i], acc[i] = most, _sums(weights), mixed if unit is None else mixed / unit


def _cached(spec: Spec, i, slot, numbers, limits, packed, cached, state):
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
        found = cached[part * spec.part : (part + 1) * spec.part].astype(packed.dtype)
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
                if limits is not None:
                    visible &= (slots >= limits[i, :1]) & (slots < limits[i, 1:])
                x = jnp.where(visible, x, _NEG)
            before, most = most, jnp.maximum(most, x.max(axis=0, keepdims=True))
            x = jnp.exp2(x - most)
            shrinks.append(jnp.exp2(before - most))
            sums = sums * shrinks[-1] + _sums(x)
            weights.append(x.astype(packed.dtype))
        if part >= _BEHIND:
            values = pair(part - _BEHIND)[1]
            if numbers is not None and not spec.widened:
                # A slot nobody reads may hold anything, and 0 * NaN is NaN: clear its values.
                values = jnp.where(readable(part - _BEHIND)[1], values, jnp.zeros_like(values))
            mixed = mixed * shrinks[part - _BEHIND] + _mixed(spec, values, weights[part - _BEHIND])
    top[i], total[i], acc[i] = most, sums, mixed


def _write(i, unit, state, out, lse):
    top, total, acc = (x[i] for x in state)
    total = total.sum(axis=0, keepdims=True)
    acc = acc if unit is None else acc * unit
    # Nothing of a tile that a query does not see counts once it has seen something: the larger
    # maximum takes it to zero. Who has seen nothing to the end has the maximum of masked scores.
    seen = top > _NEG
    out[i] = jnp.where(seen, acc / total, 0.0).astype(out.dtype)
    lse[i] = jnp.where(seen, (top + jnp.log2(total)) / LOG2E, -jnp.inf)


def _readable(spec: Spec, numbers, slot):
    """Slots that some query of the row reads."""
    inside = slot < numbers[worklist.END]
    if spec.window:
        inside &= slot >= numbers[worklist.START]
    if spec.hole:
        inside &= (slot < numbers[worklist.HOLE]) | (slot >= numbers[worklist.HOLE_END])
    return inside


def _queries(spec: Spec, i, packed, before: int = 0):
    return packed[pl.ds(pl.multiple_of(before + i * spec.rows, spec.rows), spec.rows)]


def _query(spec: Spec, i):
    """The entry that each row is a head of, int32[1, rows]."""
    row = lax.broadcasted_iota(jnp.int32, (1, spec.rows), 1) + i * spec.rows
    return row // spec.group


def _scores(spec: Spec, keys, queries):
    """Scores in base 2, float32[keys, rows]."""
    scores = _dot(keys, queries, 1, 1)
    return jnp.tanh(scores) * (spec.soft_cap * LOG2E) if spec.soft_cap else scores


def _sums(weights):
    """Sums over the keys that are left apart by sublane, [8, rows]."""
    return weights.reshape(-1, 8, weights.shape[1]).sum(axis=0)


def _mixed(spec: Spec, values, weights):
    """Values weighed, float32[H, rows]."""
    return _dot(values, weights.astype(values.dtype), 0, 0)[-spec.size :]


def _dot(a, b, axis: int, other: int):
    """The product over axis `axis` of `a` and `other` of `b`, in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((axis,), (other,)), ((), ())), precision=precision,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
