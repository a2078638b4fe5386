"""One step of block diffusion: a forward pass over a canvas, and what of it is committed.

    canvas of a row, block size 4, m a mask         positions  s    s+1  s+2  s+3
    first step, with the finished block before it              m    m    m    m
    after it: s from the causal mode, s+2 confident            x    m    x    m
    later                                                      x    x    x    x

Outputs are shifted (the entry at position i predicts token i + 1), so the token at `s` comes from
the last clean token before the block, which is why it is written at the first step whatever its
confidence. The pass that puts a finished block into the cache is the first denoising step of the
next one.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dllm_jax.cache import append
from dllm_jax.decode.state import END_OF_TURN, LENGTH, RUNNING, DecodeState, is_end, put, window
from dllm_jax.nn.transformer import Transformer, forward, logits_of
from dllm_jax.ops.sampling import draw, probabilities
from dllm_jax.policies.commit import CommitView
from dllm_jax.recipes import BlockDiffusion
from dllm_jax.typing import Key, Params
from pallas_kernels import BlockMask

_TOKEN = 1  # stream of noise


def prefill_queries(recipe: BlockDiffusion) -> int:
    """Mask entries that ride on the prefill pass."""
    return recipe.block_size


def first_tokens(model, params, recipe: BlockDiffusion, keys, state: DecodeState, last, masks):
    """The first step of the first block, from the prefill's hidden states [B, 1 | T, D]."""
    return _commit(
        model, params, recipe, keys, state, jnp.concatenate([last, masks[:, :-1]], axis=1)
    )


def step(
    model: Transformer, params: Params, recipe: BlockDiffusion, keys: Key | None, state: DecodeState
) -> DecodeState:
    """One forward pass: a row with a finished block caches it and opens the next one."""
    return jax.lax.cond(
        _complete(recipe, state).any(),
        lambda s: _pass(model, params, recipe, keys, s, fused=True),
        lambda s: _pass(model, params, recipe, keys, s, fused=False),
        state,
    )


def _complete(recipe: BlockDiffusion, state: DecodeState) -> jax.Array:
    """bool[B]: running rows whose block is written and not yet cached."""
    return ~state.finished & (state.written >= state.start + recipe.block_size)


def _pass(model, params, recipe, keys, state: DecodeState, *, fused: bool) -> DecodeState:
    size, batch = recipe.block_size, state.tokens.shape[0]
    done = _complete(recipe, state)
    block = window(state.tokens, state.start, size)
    state = dataclasses.replace(
        state,
        start=state.start + jnp.where(done, size, 0),
        block_step=jnp.where(done, 0, state.block_step),
    )
    open_block = jnp.full((batch, size), state.mask_id, jnp.int32)
    state = dataclasses.replace(
        state,
        tokens=put(
            state.tokens, state.start, open_block, jnp.broadcast_to(done[:, None], block.shape)
        ),
    )
    canvas = window(state.tokens, state.start, size)
    positions = state.start[:, None] + jnp.arange(size)
    if fused:
        out = forward(
            model,
            params,
            jnp.concatenate([block, canvas], axis=1),
            mask=BlockMask.dual_stream(size, size, stride=0, offset=size),
            positions=jnp.concatenate(
                [state.cache.lengths[:, None] + jnp.arange(size), positions], 1
            ),
            cache=state.cache,
            lengths=jnp.where(done, size, 0),
        )
        cache = append(state.cache, out.kv[:, :, :, :size], jnp.where(done, size, 0))
        before, hidden = out.hidden[:, size - 1 : size], out.hidden[:, size:]
        before = jnp.where(done[:, None, None], before, 0)
    else:
        out = forward(
            model,
            params,
            canvas,
            mask=BlockMask.block_diagonal(size),
            positions=positions,
            cache=state.cache,
        )
        cache, hidden = state.cache, out.hidden
        before = jnp.zeros_like(hidden[:, :1])
    shifted = jnp.concatenate([before, hidden[:, :-1]], axis=1)
    entries = jnp.where(done, 2 * size, size)
    state = dataclasses.replace(
        state,
        cache=cache,
        nfe=state.nfe + ~state.finished,
        queries=state.queries + jnp.where(state.finished, 0, entries),
    )
    return _commit(model, params, recipe, keys, state, shifted)


def _commit(model, params, recipe, keys, state: DecodeState, shifted) -> DecodeState:
    """Writes what the policy picks. `shifted[:, j]` [B, T, D] predicts token `start + j`."""
    size, eos_ids = recipe.block_size, model.config.eos_ids
    index = jnp.arange(size)
    positions = state.start[:, None] + index
    canvas = window(state.tokens, state.start, size)
    logits = logits_of(model, params, shifted)
    probs = jax.nn.softmax(logits, axis=-1)
    if keys is None:
        tokens = logits.argmax(axis=-1).astype(jnp.int32)
    else:
        tokens = draw(keys, positions, _TOKEN, probabilities(logits, recipe.sampling))
    confidence = jnp.take_along_axis(probs, tokens[..., None], axis=-1)[..., 0]

    end = jnp.where(is_end(canvas, eos_ids), index, size).min(axis=1)  # what follows is moot
    needed = (canvas == state.mask_id) & (index < end[:, None])
    needed &= (positions < state.limit[:, None]) & ~state.finished[:, None]
    first = state.block_step[:, None] == 0
    view = CommitView(probs, tokens, confidence, needed & ~(first & (index == 0)), state.block_step)
    commit = recipe.commit.commit(view) & needed
    commit |= needed & first & (index == 0)
    best = jnp.where(needed, confidence, -1.0).argmax(axis=1)
    commit |= needed & (index == best[:, None]) & ~commit.any(axis=1, keepdims=True)

    canvas = jnp.where(commit, tokens, canvas)
    solid = jnp.cumprod(canvas != state.mask_id, axis=1).sum(axis=1)  # gapless from the left
    end = jnp.where(is_end(canvas, eos_ids), index, size).min(axis=1)
    ended = end < solid
    written = jnp.minimum(state.start + jnp.where(ended, end + 1, solid), state.limit)
    stop = jnp.where(ended, END_OF_TURN, jnp.where(written >= state.limit, LENGTH, RUNNING))
    stop = jnp.where(ended & (state.start + end >= state.limit), LENGTH, stop)
    return dataclasses.replace(
        state,
        tokens=put(state.tokens, state.start, tokens, commit),
        written=jnp.where(state.finished, state.written, written),
        block_step=state.block_step + 1,
        stop=jnp.where(state.finished, state.stop, stop),
    )
