"""One step of block diffusion: a forward pass over a canvas, and what of it is committed.

The canvas is the `block_size` positions behind the written text. Written tokens are causal, so as
soon as they are gapless they move into the cache, exactly, and the canvas slides on; in the same
pass:

    entries   newly written tokens | canvas       m: mask
    step 1    (the prompt)         | m  m  m  m
    step 2    x                    | m  y  m  m   the third position was confident before the second
    step 3    x  y                 | m  m  m  m

Outputs are shifted (the entry at position i predicts token i + 1), so the canvas's first token
comes from the last written one, with all of its context: the causal mode's own prediction, written
at every step. The policy adds the positions behind it that are good enough. At a threshold of 1
this is autoregressive decoding.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dllm_jax.cache import append
from dllm_jax.decode.state import (
    DecodeState,
    is_end,
    put,
    scores,
    stopped,
    window,
)
from dllm_jax.nn.transformer import Transformer, forward
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
    """The first step, from the prefill's hidden states: `last` [B, 1, D], `masks` [B, T, D]."""
    tokens = _open(state, state.written, recipe.block_size)
    state = dataclasses.replace(state, tokens=tokens)
    return _commit(model, params, recipe, keys, state, last, masks)


def step(
    model: Transformer, params: Params, recipe: BlockDiffusion, keys: Key | None, state: DecodeState
) -> DecodeState:
    """Caches what was written, denoises the canvas behind it, and commits."""
    size = recipe.block_size
    fresh = state.written - state.cache.lengths  # 1 to block_size in a running row
    index = jnp.arange(size)
    clean = window(state.tokens, state.cache.lengths, size)
    canvas = window(state.tokens, state.written, size)
    out = forward(
        model,
        params,
        jnp.concatenate([clean, canvas], axis=1),
        mask=BlockMask.dual_stream(size, size, stride=0, offset=size),
        positions=jnp.concatenate(
            [state.cache.lengths[:, None] + index, state.written[:, None] + index], axis=1
        ),
        cache=state.cache,
        lengths=fresh,
    )
    last = jnp.take_along_axis(out.hidden, fresh[:, None, None] - 1, axis=1)
    counts = jnp.where(state.finished, 0, fresh)
    state = dataclasses.replace(
        state,
        cache=append(state.cache, out.kv[:, :, :, :size], counts),
        nfe=state.nfe + ~state.finished,
        queries=state.queries + jnp.where(state.finished, 0, 2 * size),
    )
    return _commit(model, params, recipe, keys, state, last, out.hidden[:, size:])


def _commit(model, params, recipe, keys, state: DecodeState, last, noisy) -> DecodeState:
    """Writes the first token of the canvas and what the policy picks, and slides the canvas on."""
    size, eos_ids = recipe.block_size, model.config.eos_ids
    index = jnp.arange(size)
    positions = state.written[:, None] + index
    canvas = window(state.tokens, state.written, size)
    logits = scores(model, params, jnp.concatenate([last, noisy[:, :-1]], axis=1))
    probs = jax.nn.softmax(logits, axis=-1)
    if keys is None:
        tokens = logits.argmax(axis=-1).astype(jnp.int32)
    else:
        tokens = draw(keys, positions, _TOKEN, probabilities(logits, recipe.sampling))
    confidence = jnp.take_along_axis(probs, tokens[..., None], axis=-1)[..., 0]

    end = jnp.where(is_end(canvas, eos_ids), index, size).min(axis=1)  # what follows it is moot
    needed = (canvas == state.mask_id) & (index < end[:, None]) & ~state.finished[:, None]
    needed &= positions < state.limit[:, None]
    behind = needed & (index > 0)
    commit = recipe.commit.commit(CommitView(probs, tokens, confidence, behind)) & behind
    commit |= needed & (index == 0)

    canvas = jnp.where(commit, tokens, canvas)
    gapless = jnp.cumprod(canvas != state.mask_id, axis=1).sum(axis=1)
    end = jnp.where(is_end(canvas, eos_ids), index, size).min(axis=1)
    ended = end < gapless
    written = state.written + jnp.where(ended, end + 1, gapless)
    written = jnp.where(state.finished, state.written, jnp.minimum(written, state.limit))
    state = dataclasses.replace(
        state,
        tokens=put(state.tokens, state.written, tokens, commit),
        stop=stopped(state, written, ended),
    )
    opened = jnp.where(state.finished[:, None], False, index < (written - state.written)[:, None])
    tokens = _open(state, state.written + size, size, opened)
    return dataclasses.replace(state, tokens=tokens, written=written)


def _open(state: DecodeState, start, size: int, keep=True) -> jax.Array:
    """The tokens with masks written at `start` and on, wherever `keep` [B, size]."""
    masks = jnp.full((state.tokens.shape[0], size), state.mask_id, jnp.int32)
    return put(state.tokens, start, masks, jnp.broadcast_to(keep, masks.shape))
