"""One step of exact decoding: check the drafts and make the next ones, in one pass.

The pass of a row whose last token is x, with drafts d1 d2 (width 2), m a mask:

    entries   x  d1 d2 | m  m  | m  m  | m  m
    reads     causal   | x     | x d1  | x d1 d2      (each group also reads itself, both ways)
    predicts  d1 d2 .  | behind each outcome: 0, 1 or 2 drafts right, the token that follows is the
                         first mask's place, so the masks predict the `width` tokens behind it

With width 0 this is autoregressive decoding.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dllm_jax.cache import append, cut
from dllm_jax.decode.state import DecodeState, gather, is_end, stopped, window, without_mask, write
from dllm_jax.nn.head import logits_of, mask_in_vocabulary, stats_of
from dllm_jax.nn.transformer import Transformer, forward
from dllm_jax.ops.sampling import draw, probabilities, uniform
from dllm_jax.recipes import Verified
from dllm_jax.typing import Key, Params
from pallas_kernels import BlockMask

_ACCEPT, _TOKEN, _DRAFT = 0, 1, 2  # streams of noise


def first_steps(model, params, recipe: Verified, keys, state: DecodeState, width: int):
    """The prefill of `width` prompt slots, and out of it the first token and the first drafts."""
    batch = len(state.prompt)
    entries = state.tokens[:, :width]
    positions = jnp.broadcast_to(jnp.arange(width), (batch, width))
    mask = BlockMask.causal(width)
    if recipe.width:
        masks = jnp.full((batch, recipe.width), state.mask_id, jnp.int32)
        entries = jnp.concatenate([entries, masks], axis=1)
        ahead = state.prompt[:, None] + jnp.arange(recipe.width)
        positions = jnp.concatenate([positions, ahead], axis=1)
        mask = BlockMask.dual_stream(width, recipe.width, stride=0, offset=width)
    out = forward(
        model, params, entries, mask=mask, positions=positions, lengths=state.prompt,
        canvas=recipe.width > 0,
    )  # fmt: skip
    state = dataclasses.replace(
        state,
        cache=append(state.cache, cut(out.kv, 0, width), state.prompt),
        nfe=state.nfe + 1,
        queries=state.queries + recipe.width,
    )
    last = gather(out.hidden, state.prompt - 1, 1)
    return _settle(model, params, recipe, keys, state, 0, last, out.hidden[:, None, width:])


def step(
    model: Transformer, params: Params, recipe: Verified, keys: Key | None, state: DecodeState
) -> DecodeState:
    """Verifies the drafts, writes the tokens that hold and one more, and drafts again."""
    width, batch = recipe.width, state.tokens.shape[0]
    last = window(state.tokens, state.written - 1, 1)
    checked = jnp.concatenate([last, state.drafts], axis=1)
    positions = state.written[:, None] - 1 + jnp.arange(width + 1)
    entries, mask = checked, BlockMask.causal(width + 1)
    if width:
        groups = (width + 1) * width
        masks = jnp.full((batch, groups), state.mask_id, jnp.int32)
        ahead = jnp.arange(width + 1)[:, None] + 1 + jnp.arange(width)  # [groups, W]
        positions = jnp.concatenate(
            [positions, state.written[:, None] - 1 + ahead.reshape(groups)], axis=1
        )
        entries = jnp.concatenate([checked, masks], axis=1)
        mask = BlockMask.dual_stream(width + 1, width, stride=1, offset=1)
    out = forward(
        model, params, entries, mask=mask, positions=positions, cache=state.cache, canvas=width > 0
    )
    hidden = out.hidden[:, : width + 1]
    groups = out.hidden[:, width + 1 :].reshape(batch, width + 1, width, model.config.dim)
    before = state.written
    after = _settle(model, params, recipe, keys, state, width, hidden, groups)
    counts = jnp.where(state.finished, 0, after.written - before)
    return dataclasses.replace(
        after,
        cache=append(state.cache, cut(out.kv, 0, width + 1), counts),
        nfe=state.nfe + ~state.finished,
        queries=state.queries + jnp.where(state.finished, 0, entries.shape[1]),
    )


def _settle(model, params, recipe, keys, state: DecodeState, count: int, hidden, groups):
    """Writes what the check of the first `count` drafts proves, and drafts behind it.

    Args:
      hidden: [B, 1 + count, D]: row i predicts the token at `written + i`.
      groups: [B, 1 + count, W, D]: masks behind each outcome.
    """
    drafts, draft_probs = state.drafts[:, :count], state.draft_probs[:, :count]
    at = state.written[:, None] + jnp.arange(count + 1)
    if keys is None:
        tokens, nats = _best(model, params, hidden, ~state.finished)
        holds = tokens[:, :count] == drafts
    else:
        logits = _scores(model, params, hidden)
        probs = probabilities(logits, recipe.sampling)
        rows = jnp.take_along_axis
        p = rows(probs[:, :count], drafts[..., None], axis=-1)[..., 0]
        q = rows(draft_probs, drafts[..., None], axis=-1)[..., 0]
        holds = uniform(keys, at[:, :count], _ACCEPT) * q < p
        # Where a draft falls, the token comes from what the draft's distribution lacks: (p - q)+.
        rest = jnp.maximum(probs[:, :count] - draft_probs, 0)
        rest = jnp.concatenate([rest, probs[:, count:]], axis=1)
        rest = jnp.where(rest.sum(axis=-1, keepdims=True) > 0, rest, probs)
        fresh = draw(keys, at, _TOKEN, rest)
        tokens = jnp.where(_pad(holds), _pad(drafts), fresh)
        nats = rows(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
    right = jnp.cumprod(holds.astype(jnp.int32), axis=1).sum(axis=1)  # how many, from the left
    kept = _kept(state, tokens, right + 1, model.config.eos_ids)
    keep = jnp.arange(count + 1) < kept[:, None]
    written = state.written + kept
    ended = (is_end(tokens, model.config.eos_ids) & keep).any(axis=1)
    state = write(state, state.written, tokens, keep, nats)
    state = dataclasses.replace(state, written=written, stop=stopped(state, written, ended))
    if not recipe.width:
        return state
    chosen = jnp.take_along_axis(groups, right[:, None, None, None], axis=1)[:, 0]
    if keys is None:
        drafts, _ = _best(model, params, chosen, ~state.finished)
        return dataclasses.replace(state, drafts=drafts)
    probs = probabilities(_scores(model, params, chosen), recipe.sampling)
    at = state.written[:, None] + jnp.arange(recipe.width)
    return dataclasses.replace(state, drafts=draw(keys, at, _DRAFT, probs), draft_probs=probs)


def _best(model, params, hidden, rows) -> tuple[jax.Array, jax.Array]:
    """The most probable token at each position of `rows` bool[B], and its log-probability."""
    found = stats_of(
        model, params, hidden, forbidden=mask_in_vocabulary(model.config),
        active=jnp.broadcast_to(rows[:, None], hidden.shape[:2]),
    )  # fmt: skip
    return found.ids[..., 0], found.scores[..., 0] - found.log_z


def _scores(model, params, hidden) -> jax.Array:
    """Logits, float32[..., V]; a mask token inside the vocabulary is never to be written."""
    return without_mask(logits_of(model, params, hidden), model.config.mask_id)


def _pad(x: jax.Array) -> jax.Array:
    """One more column of zeros: the token behind the last draft was not drafted."""
    return jnp.pad(x, ((0, 0), (0, 1)))


def _kept(state: DecodeState, tokens, count, eos_ids) -> jax.Array:
    """How many of `count` new tokens stand: up to an end, and within the limit."""
    index = jnp.arange(tokens.shape[1])
    end = jnp.where(is_end(tokens, eos_ids), index, tokens.shape[1])
    count = jnp.minimum(count, end.min(axis=1) + 1)
    count = jnp.minimum(count, state.limit - state.written)
    return jnp.where(state.finished, 0, count)
