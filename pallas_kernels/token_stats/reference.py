"""Token statistics from all scores at once: the definition."""

import jax
import jax.numpy as jnp

from pallas_kernels.token_stats.partial import LOWEST, Partial, of_scores


def scores_of(hidden, vocabulary, *, bias=None, scale=None, soft_cap=0.0) -> jax.Array:
    """Scores float32[R, v] of the tokens whose vectors are `vocabulary` [v, D]."""
    scores = jax.lax.dot_general(
        hidden, vocabulary.astype(hidden.dtype), (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    if soft_cap:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if scale is not None:
        scores = scores * scale
    return scores


def without(scores: jax.Array, ids: jax.Array, forbidden: tuple[int, ...]) -> jax.Array:
    """The scores with those of forbidden ids below all others."""
    for one in forbidden:
        scores = jnp.where(ids == one, LOWEST, scores)
    return scores


def partial_stats(
    hidden, vocabulary, *, first=0, bias=None, scale=None, soft_cap=0.0, forbidden=(), top=1,
    keys=None, temperature=None, soft=False,
) -> Partial:  # fmt: skip
    """The statistics of the tokens `first`, `first + 1`, ... whose vectors are given."""
    ids = first + jnp.arange(len(vocabulary), dtype=jnp.int32)
    scores = scores_of(hidden, vocabulary, bias=bias, scale=scale, soft_cap=soft_cap)
    return of_scores(
        without(scores, ids, forbidden), ids, top=top, keys=keys, temperature=temperature,
        vectors=vocabulary.astype(hidden.dtype) if soft else None,
    )  # fmt: skip
