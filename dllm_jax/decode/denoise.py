"""The denoising loop: scores of a block -> what to write -> what to take back -> is it done?

    pass (passes.py) -> scores -> shape, guidance -> commit -> revise -> finish -> next block

Rows of a batch are at different places: a step serves the rows that its pass is for, and leaves the
others as they are. Nothing of a row depends on its neighbours.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dllm_jax.decode import passes
from dllm_jax.decode.choice import choose
from dllm_jax.decode.passes import Pass
from dllm_jax.decode.prompt import Memory
from dllm_jax.decode.start import repeated, spread
from dllm_jax.decode.state import (
    END_OF_TURN,
    LENGTH,
    RUNNING,
    DecodeState,
    is_end,
    put,
    window,
    write,
)
from dllm_jax.ops.sampling import uniform
from dllm_jax.policies import CommitView, FinishView, Pipeline, ReNoise, ReviseView, Sliding
from dllm_jax.recipes import Denoise

_COMMIT, _REVISE, _NOISE = 2, 3, 4  # streams of noise


def first_steps(
    model, params, recipe: Denoise, keys, state: DecodeState, width: int, memory: Memory
) -> DecodeState:
    """The prefill, where there is one, and the step that rides on it."""
    if recipe.cache in ("none", "prefix", "dual"):
        return state
    given, last = passes.prefill(model, params, recipe, state, width, memory.chunk)
    if memory.samples > 1:
        state = spread(model, recipe, given.state, width, memory)
        given = Pass(repeated(given.hidden, memory), repeated(given.base, memory), state)
        last = repeated(last, memory)
    if recipe.first == "commit":
        state = given.state
        seeded = (state.start > 0) & (state.start == state.prompt)
        return _seed(model, params, recipe, keys, state, last, state.start, seeded)
    return _settle(model, params, recipe, keys, given, jnp.ones(len(state.start), bool))


def wide_rows(recipe: Denoise, state: DecodeState) -> jax.Array:
    """bool[B]: running rows whose next pass must be the wide one of two; the others' is narrow."""
    running = ~state.finished
    if recipe.cache in ("prefix", "dual"):
        return running & state.stale
    if recipe.cache == "exact_sub_block":
        base = _sub_start(recipe, state)
        index = jnp.arange(state.tokens.shape[1])
        first = (state.open & (index == base[:, None])).any(axis=1)
        return running & (state.stale | first | (_masks(state) == 0))
    return running


def two_kinds(recipe: Denoise) -> bool:
    """Whether a block has wide passes and narrow ones."""
    return recipe.cache in ("prefix", "dual", "exact_sub_block")


def step(model, params, recipe: Denoise, keys, state: DecodeState, rows, *, wide: bool):
    """One forward pass, for the `rows` [B] that it is for."""
    if recipe.cache in ("none", "prefix", "dual"):
        kind = passes.whole_canvas if wide else passes.around_block
        out = kind(model, params, recipe, state, rows)
        opening = rows if wide and recipe.first == "opening" else None
        after = _settle(model, params, recipe, keys, out, rows, opening)
        # The pass that opens a block is behind it, unless it has filled it at once.
        stale = jnp.where(rows, after.start != state.start, state.stale)
        return dataclasses.replace(after, stale=stale)
    if recipe.first == "commit" or recipe.cache == "exact_sub_block":
        return _own_pass(model, params, recipe, keys, state, rows, wide)
    kind = passes.causal if model.config.attention == "causal" else passes.block_causal
    return _settle(model, params, recipe, keys, kind(model, params, recipe, state, rows), rows)


def _own_pass(model, params, recipe: Denoise, keys, state: DecodeState, rows, wide: bool):
    """A step of a block that is cached by a pass of its own."""
    if not wide:
        out = passes.sub_block(model, params, recipe, state, _sub_start(recipe, state), rows)
        return _settle(model, params, recipe, keys, out, rows)
    full = rows & (_masks(state) == 0)
    out, behind = passes.whole_block(model, params, recipe, state, rows)
    opened = dataclasses.replace(out.state, stale=out.state.stale & ~rows)
    state = _settle(model, params, recipe, keys, out._replace(state=opened), rows & ~full)
    state = passes.keep_block(recipe, state, full)
    size = recipe.width.size
    if recipe.first == "commit":
        state = _seed(model, params, recipe, keys, state, behind, state.start + size, full)
    return _conclude(model, recipe, state, full.astype(jnp.int32), full)


def _settle(model, params, recipe: Denoise, keys, out: Pass, rows, opening=None) -> DecodeState:
    """Writes, revises and moves on, from the scores of a pass.

    Args:
      rows: bool[B], which the pass served.
      opening: bool[B], rows of which only the first position of the block is to be written.
    """
    state, sliding = out.state, isinstance(recipe.width, Sliding)
    count = out.hidden.shape[1]
    index = jnp.arange(count)
    at = out.base[:, None] + index
    canvas, is_open, is_free = (
        window(x, out.base, count) for x in (state.tokens, state.open, state.free)
    )
    inside = rows[:, None] & (at < jnp.minimum(state.reach, state.end)[:, None])
    renoise = isinstance(recipe.revise, ReNoise)
    masked = inside & (is_free if renoise else is_open)
    if recipe.width.sub:
        sub = _sub_start(recipe, state)[:, None]
        masked &= (at >= sub) & (at < sub + recipe.width.sub)
    if sliding:  # what follows an end in the canvas is moot
        ends = is_end(canvas, model.config.eos_ids) & is_free & ~is_open
        masked &= index < jnp.where(ends, index, count).min(axis=1)[:, None]
    # What is revised, seen by a part that ends the block, or carried is the whole of it.
    whole = any(part is not None for part in (recipe.revise, recipe.finish, recipe.carry))
    asked = jnp.broadcast_to(rows[:, None], at.shape) if whole else masked
    choice = choose(model, params, recipe, keys, state, out.hidden, at, asked)

    noise = lambda stream: None if keys is None else uniform(keys, at, stream, state.nfe)  # noqa: E731
    blocks = passes.capacity(recipe)
    fold = lambda x: x.reshape(-1, count // blocks, *x.shape[2:])  # noqa: E731
    chance = noise(_COMMIT)
    view = CommitView(
        tokens=fold(choice.tokens),
        confidence=fold(choice.confidence),
        entropy=fold(choice.entropy),
        margin=fold(choice.margin),
        masked=fold(masked & (index > 0) if sliding else masked),
        step=jnp.repeat(state.step, blocks),
        opened=jnp.repeat(state.opened, blocks),
        uniform=None if chance is None else fold(chance),
        everything=lambda: fold(choice.probs()),
    )
    commit = recipe.commit.commit(view) & view.masked
    if recipe.progress:
        top = jnp.argmax(view.rank("confidence"), axis=1)[:, None] == jnp.arange(commit.shape[1])
        needed = ~commit.any(axis=1) & _complete(recipe, view.masked, state)
        commit |= needed[:, None] & top & view.masked
    commit = commit.reshape(masked.shape)
    if sliding:
        commit |= masked & (index == 0)
    if opening is not None:
        commit = jnp.where(opening[:, None], masked & (index == 0), commit)
    if recipe.max_steps is not None:
        commit |= masked & (state.step + 1 >= recipe.max_steps)[:, None]

    standing = inside & is_free & ~is_open
    replace = remask = jnp.zeros_like(commit)
    if recipe.revise is not None and not renoise:
        old = window(state.logprobs, out.base, count)
        changes = ReviseView(view, commit, canvas, standing, old, noise(_REVISE))
        replace, remask = recipe.revise.revise(changes)
        replace, remask = replace & standing, remask & standing & ~replace
    before = _masks(state)
    if renoise:
        fresh = _random_tokens(model, keys, at, state.nfe)
        tokens = jnp.where(commit, choice.written, fresh)
        state = dataclasses.replace(state, tokens=put(state.tokens, out.base, tokens, masked))
    else:
        state = write(state, out.base, choice.written, commit | replace, choice.logprobs)
        state = dataclasses.replace(
            state,
            tokens=put(state.tokens, out.base, jnp.full_like(canvas, state.mask_id), remask),
            open=put(state.open, out.base, remask, remask),
        )
    state = dataclasses.replace(
        state,
        full_steps=state.full_steps + (rows & (before == 0)),
        step=state.step + rows,
    )
    done = _masks(state) == 0
    if recipe.finish is not None:
        done = recipe.finish.done(
            FinishView(
                before=before,
                left=_masks(state),
                edits=replace.sum(axis=1),
                steps=state.step,
                full_steps=state.full_steps,
                stable=(choice.greedy == state.previous).all(axis=1),
                entropy=_mean(choice.entropy, inside),
            )
        )
        seen = jnp.where(done[:, None], -1, choice.greedy)  # the next block has no step before
        previous = jnp.where(rows[:, None], seen, state.previous)
        state = dataclasses.replace(state, previous=previous)
    done &= rows
    # A block that is done has no masks; one of uniform noise ends as the most probable tokens.
    rest = window(state.open, out.base, count) & inside & done[:, None]
    ending = choice.greedy if renoise else choice.written
    state = write(state, out.base, ending, rest, choice.logprobs)
    if recipe.carry is not None:
        soft = model.apply({"params": params}, choice.soft, method="soft_embed")
        # The next block starts without.
        soft = jnp.where(done[:, None, None], 0, soft).astype(state.carry.dtype)
        kept = jnp.where(rows[:, None, None], soft, state.carry)
        state = dataclasses.replace(state, carry=kept)
    moved = _blocks_done(recipe, state, done)
    if recipe.first == "commit" or recipe.cache == "exact_sub_block":
        moved = jnp.zeros_like(moved)  # the pass that caches the block moves on
    return _conclude(model, recipe, state, jnp.where(rows, moved, 0), rows)


def _complete(recipe: Denoise, masked, state: DecodeState) -> jax.Array:
    """bool[B * blocks]: blocks that must write at least one position a step."""
    if not isinstance(recipe.width, Pipeline):
        return jnp.ones(masked.shape[0], bool)
    filled = 1 - _open_counts(recipe, state) / recipe.width.size
    enough = filled[:, :-1] >= recipe.width.complete
    return jnp.pad(enough, ((0, 0), (1, 0)), constant_values=True).reshape(-1)


def _open_counts(recipe: Denoise, state: DecodeState) -> jax.Array:
    """int32[B, blocks]: masked positions of each open block of a pipeline."""
    blocks = passes.capacity(recipe)
    is_open = window(state.open, state.start, blocks * recipe.width.size)
    return is_open.reshape(len(state.start), blocks, -1).sum(axis=2)


def _blocks_done(recipe: Denoise, state: DecodeState, done) -> jax.Array:
    """int32[B]: how many blocks from the first are done."""
    if not isinstance(recipe.width, Pipeline):
        return done.astype(jnp.int32)
    live = jnp.arange(recipe.width.blocks) * recipe.width.size + state.start[:, None]
    finished = (_open_counts(recipe, state) == 0) & (live < state.reach[:, None])
    return jnp.cumprod(finished, axis=1).sum(axis=1)


def _conclude(model, recipe: Denoise, state: DecodeState, moved, rows) -> DecodeState:
    """Moves on by `moved` [B] blocks, and sees whether the row ends."""
    index, size = jnp.arange(state.tokens.shape[1]), recipe.width.size
    first_open = jnp.where(state.open, index, state.end[:, None]).min(axis=1)
    sliding = isinstance(recipe.width, Sliding)
    if sliding:
        # Given tokens (infilling) may go on for long: a pass caches no more than `size` of them.
        start = jnp.minimum(jnp.minimum(first_open, state.limit), state.start + size)
    elif recipe.cache in ("none", "prefix", "dual"):
        # Blocks of given tokens (infilling) need no pass.
        ahead = jnp.maximum(first_open - state.start, 0) // size * size
        start = jnp.where(moved > 0, state.start + jnp.maximum(ahead, moved * size), state.start)
        start = jnp.minimum(start, state.end)
    else:
        start = state.start + moved * size
    boundary = first_open if recipe.revise is None else jnp.minimum(first_open, start)
    boundary = jnp.maximum(boundary, state.prompt)

    ends = is_end(state.tokens, model.config.eos_ids) & state.free & ~state.open
    at_end = jnp.where(ends, index, state.tokens.shape[1]).min(axis=1)
    final = jnp.minimum(boundary, state.limit)
    has_end, full = at_end < final, boundary >= state.limit
    reach = _reach(recipe, state, start, at_end)
    if recipe.ending == "answer":
        stops = has_end | full
    elif recipe.ending == "block":
        if isinstance(recipe.width, Pipeline):
            blocks_end = start == reach
        else:
            blocks_end = (moved > 0) | (_masks(state) == 0)
        stops = (has_end & blocks_end & (at_end < state.reach)) | full
    else:
        stops = full
    written = jnp.where(stops & has_end, at_end + 1, final)
    stop = jnp.where(stops, jnp.where(has_end, END_OF_TURN, LENGTH), RUNNING)

    fresh = start != state.start
    upcoming = (index >= start[:, None]) & (index < (start + size)[:, None]) & state.open
    change = lambda new, old: jnp.where(rows & ~state.finished, new, old)  # noqa: E731
    return dataclasses.replace(
        state,
        start=change(start, state.start),
        reach=change(reach, state.reach),
        blocks=state.blocks + change(moved, 0),
        step=change(jnp.where(fresh, 0, state.step), state.step),
        full_steps=change(jnp.where(fresh, 0, state.full_steps), state.full_steps),
        opened=change(jnp.where(fresh, upcoming.sum(axis=1), state.opened), state.opened),
        stale=change(fresh | state.stale, state.stale),
        written=change(written, state.written),
        stop=change(stop, state.stop),
    )


def _reach(recipe: Denoise, state: DecodeState, start, at_end) -> jax.Array:
    """int32[B]: where the last open block ends."""
    size = recipe.width.size
    if not isinstance(recipe.width, Pipeline):
        return start + size if isinstance(recipe.width, Sliding) else jnp.minimum(
            start + size, state.end
        )  # fmt: skip
    index = jnp.arange(state.tokens.shape[1])
    last = (index >= (state.reach - size)[:, None]) & (index < state.reach[:, None])
    filled = 1 - (last & state.open).sum(axis=1) / size
    room = (state.reach - start) // size < recipe.width.blocks
    grows = (filled >= recipe.width.add) & room & (state.reach < state.end)
    if recipe.ending != "never":
        grows &= at_end >= state.tokens.shape[1]  # nothing follows an end
    return state.reach + jnp.where(grows, size, 0)


def _seed(model, params, recipe: Denoise, keys, state: DecodeState, hidden, at, rows):
    """Writes the token at `at` [B], which the entry before it predicts."""
    at = jnp.minimum(at, state.tokens.shape[1] - 1)
    there = jnp.take_along_axis(state.open, at[:, None], axis=1) & rows[:, None]
    choice = choose(model, params, recipe, keys, state, hidden, at[:, None], there)
    state = write(state, at, choice.written, there, choice.logprobs)
    return _conclude(model, recipe, state, jnp.zeros_like(at), rows)


def _sub_start(recipe: Denoise, state: DecodeState) -> jax.Array:
    """int32[B]: where the leftmost sub-block with masks begins."""
    index = jnp.arange(state.tokens.shape[1])
    is_open = state.open & (index >= state.start[:, None]) & (index < state.reach[:, None])
    first = jnp.where(is_open, index, state.reach[:, None] - 1).min(axis=1)
    return state.start + (first - state.start) // recipe.width.sub * recipe.width.sub


def _masks(state: DecodeState) -> jax.Array:
    """int32[B]: masked positions of the open blocks."""
    index = jnp.arange(state.tokens.shape[1])
    inside = (index >= state.start[:, None]) & (index < state.reach[:, None])
    return (state.open & inside).sum(axis=1)


def _random_tokens(model, keys, at, step) -> jax.Array:
    """Noise of uniform diffusion: any token of the vocabulary, int32[B, C]."""
    if keys is None:
        raise ValueError("uniform noise is random and needs a key: generate(..., key=...)")
    vocab = model.config.vocab_size
    return jnp.minimum((uniform(keys, at, _NOISE, step) * vocab).astype(jnp.int32), vocab - 1)


def _mean(values, where) -> jax.Array:
    return (values * where).sum(axis=1) / jnp.maximum(where.sum(axis=1), 1)
