"""What the model says at positions of a canvas: which token, and how surely.

The scores of all tokens are not formed: one pass over the vocabulary gives what is asked
(`pallas_kernels.token_stats`). Filters (top-k, top-p) and shaping parts of a user's own do ask for
them, and get them a few positions at a time; a policy that reads `view.probs` gets them all.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dllm_jax.decode.state import DecodeState
from dllm_jax.nn.head import head_of, logits_of, mask_in_vocabulary, scores_of, stats_of
from dllm_jax.ops.sampling import (
    best_token,
    draw_with,
    is_filtered,
    keys_at,
    probabilities,
    shaped,
    warmth,
)
from dllm_jax.policies import AnnealedTemperature, Forbid, ReNoise
from dllm_jax.policies.commit import entropy
from dllm_jax.recipes import Denoise
from pallas_kernels import TokenStats
from pallas_kernels.token_stats.rows import over_active

_TOKEN = 1  # stream of noise
_AT_ONCE = 8  # positions whose scores exist at a time, where they must


class Choice(NamedTuple):
    """What the model says at C positions of each row, or at any number of positions."""

    greedy: jax.Array  # int32[B, C]: the most probable token that may be written
    tokens: jax.Array  # int32[B, C]: the drawn one, or the same
    written: jax.Array  # int32[B, C]: what a commit writes: the token, or the forced one
    logprobs: jax.Array  # float32[B, C]: of that, among tokens that may be written
    # Of the distribution that policies see (`Denoise.confidence`). The mask token's share counts
    # in it, though it is not to be written, as in published codes.
    confidence: jax.Array  # float32[B, C]: probability of the token
    entropy: jax.Array  # float32[B, C]: nats
    margin: jax.Array  # float32[B, C]: between the two most probable tokens
    soft: jax.Array | None = None  # [B, C, D]: mean of the tokens' vectors, for the next step
    probs: Any = None  # () -> float32[B, C, V]: all of them


def choose(model, params, recipe: Denoise, keys, state: DecodeState, hidden, at, asked) -> Choice:
    """The choice at positions `at` [B, C], from what predicts them.

    Args:
      hidden: [B, C, D]; with guidance [2 * B, C, D], those without the prompt behind.
      asked: bool[B, C], positions whose choice anybody reads; that of the others means nothing.
    """
    if recipe.guidance is not None:  # scores are linear in the hidden states
        given, without = jnp.split(hidden.astype(jnp.float32), 2)
        hidden = recipe.guidance.combine(given, without).astype(hidden.dtype)
    step = jnp.broadcast_to(state.step[:, None], at.shape)
    noise = None if keys is None else keys_at(keys, at, _TOKEN, state.nfe)
    forced = None
    if state.forced.shape[1]:
        index = jnp.minimum(at, state.forced.shape[1] - 1)
        forced = jnp.take_along_axis(state.forced, index, axis=1)
    arguments = (model, params, recipe, hidden, step, noise, forced, asked)
    if _is_custom(recipe):
        found = _a_few_at_a_time(*arguments)
    else:
        found = _streamed(*arguments)
        if noise is not None:  # whether a filter is on is a number, which the program does not know
            found = jax.lax.cond(
                is_filtered(recipe.sampling),
                lambda: _a_few_at_a_time(*arguments)._replace(soft=found.soft),
                lambda: found,
            )
    return found._replace(probs=partial(_probs, model, params, recipe, hidden, step))


def _streamed(model, params, recipe: Denoise, hidden, step, noise, forced, asked) -> Choice:
    """From one pass over the vocabulary."""
    scale = None
    if isinstance(recipe.shape, AnnealedTemperature):
        scale = 1 / recipe.shape.temperature(step)
    warm = warmth(recipe.sampling)
    stats = stats_of(
        model, params, hidden, scale=scale, forbidden=_forbidden(model, recipe), top=2, keys=noise,
        temperature=None if noise is None else warm,
        soft=None if recipe.carry is None else "exact", active=asked,
    )  # fmt: skip
    greedy, best = stats.ids[..., 0], stats.scores[..., 0]
    token, score = greedy, best
    if stats.drawn is not None:
        cold = jnp.asarray(recipe.sampling.temperature) <= 0
        token = jnp.where(cold, greedy, stats.drawn.ids)
        score = jnp.where(cold, best, stats.drawn.scores)
    written, own = token, score
    if isinstance(recipe.revise, ReNoise):  # such a canvas ends as its most probable tokens
        own = best
    elif forced is not None:
        barred = jnp.asarray(_forbidden(model, recipe), jnp.int32)
        own = scores_of(model, params, hidden, forced, scale)
        own = jnp.where((forced[..., None] == barred).any(axis=-1), -jnp.inf, own)
        written = forced
    mask = _counted(model, recipe)
    mask = None if mask is None else scores_of(model, params, hidden, mask, scale)
    confidence, spread, margin = _seen(recipe, stats, score, mask)
    return Choice(
        greedy, token, written, own - stats.log_z, confidence, spread, margin, soft=stats.soft
    )


def _seen(recipe: Denoise, stats: TokenStats, score, mask) -> tuple[jax.Array, ...]:
    """Confidence, entropy and margin as policies see them: with the mask token's share, if any."""
    log_z, spread, (first, second) = stats.log_z, stats.entropy, jnp.moveaxis(stats.scores, -1, 0)
    if recipe.confidence == "sampled" and stats.drawn is not None:
        warm = warmth(recipe.sampling)
        log_z, spread = stats.drawn.log_z, stats.drawn.entropy
        score, first, second = score / warm, first / warm, second / warm
        mask = None if mask is None else mask / warm
    total = log_z
    if mask is not None:
        total = jnp.logaddexp(log_z, mask)
        inside, apart = log_z - total, mask - total
        spread = jnp.exp(inside) * (spread - inside) - jnp.exp(apart) * apart
        first, second = jnp.maximum(first, mask), jnp.maximum(second, jnp.minimum(first, mask))
    margin = jnp.exp(first - total) - jnp.exp(second - total)
    return jnp.exp(score - total), spread, margin


def _a_few_at_a_time(model, params, recipe: Denoise, hidden, step, noise, forced, asked) -> Choice:
    """From the scores of all tokens, which exist for a few positions at a time."""
    lead = hidden.shape[:2]
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731

    def some(xs) -> Choice:
        hidden, step, noise, forced = xs
        logits, scores, allowed = _scores(model, params, recipe, hidden, step)
        greedy = best_token(allowed)
        token = greedy
        if noise is not None:
            token = draw_with(noise, probabilities(allowed, recipe.sampling))
        written = token if forced is None else forced
        own = lambda x, ids: jnp.take_along_axis(x, ids[:, None], axis=1)[:, 0]  # noqa: E731
        scored = greedy if isinstance(recipe.revise, ReNoise) else written
        probs = jax.nn.softmax(scores)
        first, second = jnp.moveaxis(jax.lax.top_k(probs, 2)[0], -1, 0)
        return Choice(
            greedy, token, written, own(jax.nn.log_softmax(allowed), scored), own(probs, token),
            entropy(probs), first - second,
            None if recipe.carry is None else _mean_vector(model, params, logits),
        )  # fmt: skip

    rows = jax.tree.map(flat, (hidden, step, noise, forced))
    found = over_active(some, rows, flat(asked), (min(_AT_ONCE, asked.size),))
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found)


def _scores(model, params, recipe: Denoise, hidden, step) -> tuple[jax.Array, ...]:
    """The model's scores, those that policies see, and of tokens that may be written, [R, V]."""
    logits = logits_of(model, params, hidden)
    shape = recipe.shape
    if shape is not None:  # a part works on blocks: here of one position
        logits = shape.shape(logits[:, None], step)[:, 0]
    barred = jnp.asarray(_forbidden(model, recipe), jnp.int32)
    allowed = logits.at[:, barred].set(-jnp.inf) if barred.size else logits
    if recipe.confidence != "sampled":
        return logits, logits, allowed
    scores, mask = shaped(allowed, recipe.sampling), _counted(model, recipe)
    if mask is not None:  # it counts unless the filters would take it out
        least = jnp.where(scores > -jnp.inf, scores, jnp.inf).min(axis=1)
        own = logits[:, mask] / warmth(recipe.sampling)
        scores = scores.at[:, mask].set(jnp.where(own >= least, own, -jnp.inf))
    return logits, scores, allowed


def _probs(model, params, recipe: Denoise, hidden, step) -> jax.Array:
    flat = hidden.reshape(-1, hidden.shape[-1])
    _, scores, _ = _scores(model, params, recipe, flat, step.reshape(-1))
    return jax.nn.softmax(scores).reshape(*hidden.shape[:2], -1)


def _mean_vector(model, params, logits) -> jax.Array:
    vectors = head_of(model, params).vectors
    return jax.nn.softmax(logits).astype(vectors.dtype) @ vectors


def _forbidden(model, recipe: Denoise) -> tuple[int, ...]:
    """Tokens that are not to be written: the mask token, where it has a score, and the recipe's."""
    mask = () if recipe.predict_mask else mask_in_vocabulary(model.config)
    return (*mask, *_barred(recipe))


def _counted(model, recipe: Denoise) -> int | None:
    """The mask token, where its share counts though it is not to be written."""
    own = [i for i in _forbidden(model, recipe) if i not in _barred(recipe)]
    return own[0] if own else None


def _barred(recipe: Denoise) -> tuple[int, ...]:
    return recipe.shape.tokens if isinstance(recipe.shape, Forbid) else ()


def _is_custom(recipe: Denoise) -> bool:
    """Whether a part shapes the scores in a way that is not known here."""
    return type(recipe.shape) not in (type(None), AnnealedTemperature, Forbid)
