"""One step of exact decoding: check the drafts and make the next ones, in one pass.

The pass of a row whose last token is x, with drafts d1 d2 (width 2), m a mask:

    entries   x  d1 d2 | m  m  | m  m  | m  m
    reads     causal   | x     | x d1  | x d1 d2      (each group also reads itself, both ways)
    predicts  d1 d2 .  | behind each outcome: 0, 1 or 2 drafts right, the token that follows is the
                         first mask's place, so the masks predict the `width` tokens behind it

With width 0 this is autoregressive decoding. So is what any width writes, token for token, samples
too: what a position's check draws is the token, and a draft holds if it is the same. Both draw with
the noise of the position, which makes them agree nearly as often as anything could (Daliri et al.
2024, arXiv 2408.07978), and needs the distributions of neither.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dllm_jax.cache import append, cut
from dllm_jax.decode import prefill
from dllm_jax.decode.prompt import Memory
from dllm_jax.decode.start import repeated, spread
from dllm_jax.decode.state import DecodeState, gather, is_end, stopped, window, write
from dllm_jax.nn.head import logits_of, mask_in_vocabulary, scores_of, stats_of, without_mask
from dllm_jax.nn.transformer import Transformer, forward
from dllm_jax.ops.sampling import draw_with, is_filtered, keys_at, probabilities, warmth
from dllm_jax.recipes import Verified
from dllm_jax.typing import Key, Params
from pallas_kernels import BlockMask
from pallas_kernels.token_stats.rows import over_active

_TOKEN = 1  # stream of noise
_AT_ONCE = 8  # positions whose scores exist at a time, where they must


def first_steps(
    model, params, recipe: Verified, keys, state: DecodeState, width: int, memory: Memory
):
    """The prefill of `width` prompt slots, and out of it the first token and the first drafts."""
    batch, count = len(state.prompt), recipe.width
    chunks, begin = prefill.parts(width, memory.chunk)
    size = width - begin
    entries = state.tokens[:, begin:width]
    positions = jnp.broadcast_to(begin + jnp.arange(size), (batch, size))
    mask, cached = BlockMask.causal(size), {}
    last = jnp.zeros((batch, 1, model.config.dim), model.config.dtype)
    if chunks:

        def passed(entries, at, **options):
            return forward(model, params, entries, positions=at, canvas=False, **options)

        cache, last = prefill.before_last(
            passed, state.tokens, state.prompt, state.cache, last, chunks, memory.chunk, 1
        )
        state = dataclasses.replace(state, cache=cache)
        cached = {"cache": cache, "cache_end": cache.lengths}
    if count:
        masks = jnp.full((batch, count), state.mask_id, jnp.int32)
        entries = jnp.concatenate([entries, masks], axis=1)
        ahead = state.prompt[:, None] + jnp.arange(count)
        positions = jnp.concatenate([positions, ahead], axis=1)
        mask = BlockMask.dual_stream(size, count, stride=0, offset=size)
    lengths = jnp.maximum(state.prompt - begin, 0)
    out = forward(
        model, params, entries, mask=mask, positions=positions, lengths=lengths, canvas=count > 0,
        **cached,
    )  # fmt: skip
    state = dataclasses.replace(
        state,
        cache=append(state.cache, cut(out.kv, 0, size), lengths),
        nfe=state.nfe + 1,
        queries=state.queries + count,
    )
    own = gather(out.hidden, lengths - 1, 1)
    last = jnp.where((lengths > 0)[:, None, None], own, last)
    groups = out.hidden[:, None, size:]
    if memory.samples > 1:
        state = spread(model, recipe, state, width, memory)
        last, groups = repeated(last, memory), repeated(groups, memory)
    return _settle(model, params, recipe, keys, state, 0, last, groups)


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
    drafts = state.drafts[:, :count]
    at = state.written[:, None] + jnp.arange(count + 1)
    tokens, nats = _said(model, params, recipe, keys, at, hidden, ~state.finished)
    holds = tokens[:, :count] == drafts
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
    at = state.written[:, None] + jnp.arange(recipe.width)
    drafts, _ = _said(model, params, recipe, keys, at, chosen, ~state.finished)
    return dataclasses.replace(state, drafts=drafts)


def _said(model, params, recipe: Verified, keys, at, hidden, rows) -> tuple[jax.Array, jax.Array]:
    """The token at each position `at` [B, C], and its log-probability before the temperature.

    Of `rows` bool[B]; nobody reads what the others say.

    The most probable one, or a sample whose noise is of the position alone: a draft and the check
    of it share theirs. Only a filter (top-k, top-p) asks for all scores, a few positions at a time.
    """
    barred, sampling = mask_in_vocabulary(model.config), recipe.sampling
    active = jnp.broadcast_to(rows[:, None], at.shape)
    if keys is None:
        found = stats_of(model, params, hidden, forbidden=barred, active=active)
        return found.ids[..., 0], found.scores[..., 0] - found.log_z
    noise = keys_at(keys, at, _TOKEN)
    found = stats_of(
        model, params, hidden, forbidden=barred, active=active, keys=noise,
        temperature=warmth(sampling),
    )  # fmt: skip
    assert found.drawn is not None
    cold = jnp.asarray(sampling.temperature) <= 0
    free = jnp.where(cold, found.ids[..., 0], found.drawn.ids)

    def some(position) -> jax.Array:
        hidden, noise = position
        logits = without_mask(logits_of(model, params, hidden), model.config.mask_id)
        return draw_with(noise, probabilities(logits, sampling))

    def filtered() -> jax.Array:
        flat = hidden.reshape(-1, hidden.shape[-1]), noise.reshape(-1, 2)
        sizes = (min(_AT_ONCE, active.size),)
        return over_active(some, flat, active.reshape(-1), sizes).reshape(at.shape)

    tokens = jax.lax.cond(is_filtered(sampling), filtered, lambda: free)
    return tokens, scores_of(model, params, hidden, tokens) - found.log_z


def _kept(state: DecodeState, tokens, count, eos_ids) -> jax.Array:
    """How many of `count` new tokens stand: up to an end, and within the limit."""
    index = jnp.arange(tokens.shape[1])
    end = jnp.where(is_end(tokens, eos_ids), index, tokens.shape[1])
    count = jnp.minimum(count, end.min(axis=1) + 1)
    count = jnp.minimum(count, state.limit - state.written)
    return jnp.where(state.finished, 0, count)
