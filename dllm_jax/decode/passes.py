"""Where the scores of a block come from: the forward passes of each kind of cache.

    none            [ the whole canvas ]                                      at every step
    prefix, dual    [ the whole canvas ]  then  [ block and suffix ] or [ block ] against what the
                    first pass of the block left in the cache
    exact           [ finished blocks | open blocks ]  against the cache of those before; the
                    finished ones are cached by the pass that denoises the next

Each returns hidden states aligned with the canvas: entry i predicts the token at `start + i`,
whether the model's outputs are shifted or not. With guidance every row is there twice.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dllm_jax.cache import append, cut, replaced
from dllm_jax.decode import prefill as chunks
from dllm_jax.decode.state import DecodeState, gather, window
from dllm_jax.nn.transformer import forward
from dllm_jax.policies import Pipeline, Sliding
from dllm_jax.recipes import Denoise
from pallas_kernels import BlockMask


class Pass(NamedTuple):
    """What a pass gives to the rows that it serves."""

    hidden: jax.Array  # [R, C, D]: entry i predicts the token at `base + i`
    base: jax.Array  # int32[B]
    state: DecodeState  # with the cache as the pass left it


def passed(model, params, recipe: Denoise, state: DecodeState, entries, at, **options):
    """One forward pass over `entries` [B, Q] at positions `at` [B, Q]."""
    if recipe.guidance is not None:
        index = jnp.minimum(at, state.free.shape[1] - 1)
        hide = ~jnp.take_along_axis(state.free, index, axis=1)
        keep = recipe.guidance.keep
        if keep is not None:
            keep = jnp.pad(keep, ((0, 0), (0, state.free.shape[1] - keep.shape[1])))
            hide &= ~jnp.take_along_axis(keep, index, axis=1)
        entries = jnp.concatenate([entries, jnp.where(hide, state.mask_id, entries)])
        at = twice(recipe, at)
        for name in ("cache_end", "lengths", "hole"):
            if options.get(name) is not None:
                options[name] = jax.tree.map(partial(twice, recipe), options[name])
    return forward(model, params, entries, positions=at, **options)


def twice(recipe: Denoise, x: jax.Array) -> jax.Array:
    """`x` [B, ...] for every row of a pass: [2 * B, ...] with guidance."""
    return x if recipe.guidance is None else jnp.concatenate([x, x])


def capacity(recipe: Denoise) -> int:
    """Blocks that may be open at once."""
    return recipe.width.blocks if isinstance(recipe.width, Pipeline) else 1


def shifted(model) -> bool:
    """Whether the entry before a position predicts it."""
    return model.config.alignment == "shifted"


def whole_canvas(model, params, recipe: Denoise, state: DecodeState, rows) -> Pass:
    """All of the canvas, bidirectional; its keys and values are kept where a cache wants them."""
    batch, length = state.tokens.shape
    at = jnp.broadcast_to(jnp.arange(length), (batch, length))
    out = passed(
        model, params, recipe, state, state.tokens, at,
        mask=BlockMask.bidirectional(length), lengths=state.end,
    )  # fmt: skip
    if recipe.cache != "none":  # all running rows are served: nobody needs the old one
        ends = twice(recipe, state.end)
        state = dataclasses.replace(state, cache=replaced(state.cache, out.kv, ends))
    state = _count(state, rows, state.end)
    start = twice(recipe, state.start) - shifted(model)
    return Pass(gather(out.hidden, start, recipe.width.size), state.start, state)


def around_block(model, params, recipe: Denoise, state: DecodeState, rows) -> Pass:
    """The block, or block and suffix, against the keys and values of the canvas around it."""
    size = recipe.width.size
    if recipe.cache == "dual":
        entries, at = _entries(state, state.start, size)
        out = passed(
            model, params, recipe, state, entries, at,
            mask=BlockMask.bidirectional(size), lengths=jnp.minimum(state.end - state.start, size),
            cache=state.cache, cache_end=state.end, hole=(state.start, state.start + size),
        )  # fmt: skip
        hidden, count = out.hidden, size
    else:
        count = state.end - state.start
        hidden = _by_length(
            partial(_suffix, model, params, recipe, state),
            jnp.where(rows, count, 0).max(),
            _halves(state.tokens.shape[1], size),
        )
    if shifted(model):
        hidden = _shift(hidden, hidden[:, :1])
    return Pass(hidden, state.start, _count(state, rows, count))


def _suffix(model, params, recipe: Denoise, state: DecodeState, length: int) -> jax.Array:
    entries, at = _entries(state, state.start, length)
    out = passed(
        model, params, recipe, state, entries, at,
        mask=BlockMask.bidirectional(length), lengths=state.end - state.start,
        cache=state.cache, cache_end=state.start,
    )  # fmt: skip
    return out.hidden[:, : recipe.width.size]


class Block(NamedTuple):
    """A pass over blocks behind an exact cache."""

    hidden: jax.Array  # [R, C, D], aligned with the open blocks
    stored: Any  # [Ly, R, K, Q, 2 * H]: of the entries that follow the cache
    last: jax.Array  # [R, 1, D]: of the last of the finished entries


def block_causal(model, params, recipe: Denoise, state: DecodeState, rows) -> Pass:
    """Finished blocks that are not cached yet, and the open ones, each seeing those before it."""
    size, open_blocks = recipe.width.size, capacity(recipe)
    fresh = state.start - state.cache.lengths[: len(state.start)]
    live = fresh + state.reach - state.start

    def run(length: int) -> Block:
        entries, at = _entries(state, state.start - fresh, length)
        out = passed(
            model, params, recipe, state, entries, at,
            mask=BlockMask.block_causal(length, size), lengths=live, cache=state.cache,
            cache_end=state.start - fresh,
        )  # fmt: skip
        skip = twice(recipe, fresh)
        hidden = gather(out.hidden, skip, open_blocks * size)
        most = min(length, open_blocks * size)
        stored = jax.tree.map(
            lambda x: jnp.pad(x, (*[(0, 0)] * 3, (0, open_blocks * size - most), (0, 0))),
            cut(out.kv, 0, most),
        )
        return Block(hidden, stored, gather(out.hidden, skip - 1, 1))

    lengths = [size * n for n in _doubling(2 * open_blocks)]
    out = _by_length(run, jnp.where(rows, live, 0).max(), lengths)
    hidden = out.hidden
    counts = jnp.where(rows, fresh, 0)
    if shifted(model):
        per_row = lambda x: twice(recipe, x)[:, None, None]  # noqa: E731
        last = jnp.where(per_row(fresh > 0), out.last, state.last)
        last = jnp.where(per_row(state.start == 0), hidden[:, :1], last)  # nothing is before it
        hidden = _shift(hidden, last)
        kept = twice(recipe, rows)[:, None, None]
        state = dataclasses.replace(state, last=jnp.where(kept, last, state.last))
    state = _store(recipe, state, out.stored, counts)
    return Pass(hidden, state.start, _count(state, rows, live))


def causal(model, params, recipe: Denoise, state: DecodeState, rows) -> Pass:
    """Finished tokens, each seeing those before it, and a canvas that sees them and itself."""
    size = recipe.width.size
    fresh = state.start - state.cache.lengths[: len(state.start)]
    canvas, at = _entries(state, state.start, size)
    conditioning = {} if recipe.carry is None else {"carry": state.carry}

    def wide(_) -> Block:
        clean, before = _entries(state, state.start - fresh, size)
        out = passed(
            model, params, recipe, state,
            jnp.concatenate([clean, canvas], axis=1), jnp.concatenate([before, at], axis=1),
            mask=BlockMask.dual_stream(size, size, stride=0, offset=size),
            lengths=fresh, cache=state.cache, cache_end=state.start - fresh, **conditioning,
        )  # fmt: skip
        last = gather(out.hidden, twice(recipe, fresh) - 1, 1)
        return Block(out.hidden[:, size:], cut(out.kv, 0, size), last)

    def narrow(_) -> Block:
        out = passed(
            model, params, recipe, state, canvas, at, mask=BlockMask.block_diagonal(size),
            cache=state.cache, cache_end=state.start, **conditioning,
        )  # fmt: skip
        return Block(out.hidden, jax.tree.map(jnp.zeros_like, out.kv), out.hidden[:, :1])

    counts = jnp.where(rows, fresh, 0)
    if isinstance(recipe.width, Sliding):  # something is always fresh
        out = wide(None)
        entries = 2 * size
    else:
        out = jax.lax.cond((counts > 0).any(), wide, narrow, None)
        entries = fresh + size
    hidden = _shift(out.hidden, out.last) if shifted(model) else out.hidden
    state = _store(recipe, state, out.stored, counts)
    return Pass(hidden, state.start, _count(state, rows, entries))


def whole_block(model, params, recipe: Denoise, state: DecodeState, rows) -> tuple[Pass, jax.Array]:
    """The one open block, which no finished one precedes, and what predicts the token behind it.

    Its keys and values lie behind the cached ones; they count when `keep_block` says so.
    """
    size = recipe.width.size
    entries, at = _entries(state, state.start, size)
    out = passed(
        model, params, recipe, state, entries, at, mask=BlockMask.bidirectional(size),
        cache=state.cache, cache_end=state.start,
    )  # fmt: skip
    state = _store(recipe, state, out.kv, jnp.zeros_like(state.start))
    hidden = _shift(out.hidden, out.hidden[:, :1]) if shifted(model) else out.hidden
    return Pass(hidden, state.start, _count(state, rows, size)), out.hidden[:, -1:]


def keep_block(recipe: Denoise, state: DecodeState, rows) -> DecodeState:
    """The block behind the cached ones becomes one of them."""
    counts = twice(recipe, jnp.where(rows, recipe.width.size, 0))
    cache = dataclasses.replace(state.cache, lengths=state.cache.lengths + counts)
    return dataclasses.replace(state, cache=cache)


def sub_block(model, params, recipe: Denoise, state: DecodeState, base, rows) -> Pass:
    """The sub-block at `base` [B], against the keys and values of the block around it."""
    size = recipe.width.sub
    entries, at = _entries(state, base, size)
    out = passed(
        model, params, recipe, state, entries, at, mask=BlockMask.bidirectional(size),
        cache=state.cache, cache_end=state.start + recipe.width.size, hole=(base, base + size),
    )  # fmt: skip
    hidden = _shift(out.hidden, out.hidden[:, :1]) if shifted(model) else out.hidden
    return Pass(hidden, base, _count(state, rows, size))


def prefill(
    model, params, recipe: Denoise, state: DecodeState, width: int, chunk: int
) -> tuple[Pass, Any]:
    """What is before the first block goes into the cache, and that block rides on the last pass.

    Args:
      chunk: tokens of a pass (`chunks`); 0: all of them.

    Returns:
      The pass, and the hidden state of the last cached token, [R, 1, D].
    """
    size, config = recipe.width.size, model.config
    riding = recipe.first != "commit"
    seen = {"causal": 1, "block_causal": size}.get(config.attention, width)
    count, begin = chunks.parts(width, chunk)
    cached, before = {}, None
    if count:
        cache, before = chunks.before_last(
            partial(passed, model, params, recipe, state), state.tokens, state.start, state.cache,
            jnp.zeros((state.cache.lengths.shape[0], 1, config.dim), config.dtype), count, chunk,
            seen, partial(twice, recipe),
        )  # fmt: skip
        state = dataclasses.replace(state, cache=cache)
        cached = {"cache": cache, "cache_end": jnp.minimum(state.start, begin)}
    rest = width - begin
    at = jnp.broadcast_to(begin + jnp.arange(rest), (len(state.start), rest))
    entries = state.tokens[:, begin:width]
    mask = BlockMask.block_causal(rest, seen)
    if riding:
        block, behind = _entries(state, state.start, size)
        entries = jnp.concatenate([entries, block], axis=1)
        at = jnp.concatenate([at, behind], axis=1)
        mask = BlockMask.dual_stream(rest, size, stride=0, offset=rest, clean_block=seen)
    lengths = jnp.maximum(state.start - begin, 0)
    out = passed(model, params, recipe, state, entries, at, mask=mask, lengths=lengths, **cached)
    state = _store(recipe, state, cut(out.kv, 0, rest), lengths)
    hidden = out.hidden[:, rest:]
    last = gather(out.hidden[:, :rest], twice(recipe, lengths) - 1, 1)
    if before is not None:
        last = jnp.where(twice(recipe, lengths > 0)[:, None, None], last, before)
    if riding and shifted(model):
        own = twice(recipe, state.start == 0)[:, None, None]
        hidden = _shift(hidden, jnp.where(own, hidden[:, :1], last))
    if state.last.shape[0]:
        state = dataclasses.replace(state, last=last)
    blocks = capacity(recipe)
    hidden = jnp.pad(hidden, ((0, 0), (0, (blocks - 1) * size if riding else 0), (0, 0)))
    rows = jnp.ones(len(state.start), bool) if riding else state.start > 0
    return Pass(hidden, state.start, _count(state, rows, size if riding else 0)), last


def _entries(state: DecodeState, start, size: int) -> tuple[jax.Array, jax.Array]:
    """Tokens and positions of `size` entries from `start` [B] on."""
    return window(state.tokens, start, size), start[:, None] + jnp.arange(size)


def _shift(hidden, first) -> jax.Array:
    """What predicts a position where the entry before it does: `first` [R, 1, D], for the first."""
    return jnp.concatenate([first, hidden[:, :-1]], axis=1)


def _store(recipe: Denoise, state: DecodeState, kv, counts) -> DecodeState:
    return dataclasses.replace(state, cache=append(state.cache, kv, twice(recipe, counts)))


def _count(state: DecodeState, rows, entries) -> DecodeState:
    return dataclasses.replace(
        state,
        nfe=state.nfe + rows,
        queries=state.queries + jnp.where(rows, entries, 0),
    )


def _by_length(run, needed, lengths: list[int]):
    """`run(length)` for the least of the ascending `lengths` that holds `needed` entries."""
    if len(lengths) == 1:
        return run(lengths[0])
    choice = (needed > jnp.asarray(lengths[:-1])).sum()
    return jax.lax.switch(choice, [lambda _, n=n: run(n) for n in lengths], None)


def _doubling(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`."""
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], most))
    return sizes


def _halves(length: int, least: int) -> list[int]:
    """A quarter, half and all of `length`, but not less than `least`."""
    return sorted({max(-(-length // part), least) for part in (4, 2, 1)})
