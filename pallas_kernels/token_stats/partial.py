"""Statistics of a part of the vocabulary, and how two parts become one.

The algebra of a streamed softmax (Milakov & Gimelshein 2018, arXiv 1805.02867): with m the largest
score so far, s = sum e^(z - m) and u = sum (z - m) e^(z - m),

    log Z = m + log s        entropy = log s - u / s        p(i) = e^(z_i - log Z)

and a part with another m is brought to this one by a factor. Merging is associative, so tiles and
shards of a vocabulary may come in any grouping; they must come in the order of their ids, which
decides between equal scores (the lowest id wins).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.token_stats.noise import gumbel

# Below every score: of tokens that are forbidden, or not there. Finite: inf - inf is no number.
LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)


class Mass(NamedTuple):
    """Sums over a part of the vocabulary, float32[R] each."""

    top: jax.Array  # m
    total: jax.Array  # s
    spread: jax.Array  # u


class Race(NamedTuple):
    """The winner of the Gumbel race over a part of the vocabulary (a sample)."""

    value: jax.Array  # float32[R]: its score over the temperature, plus noise
    id: jax.Array  # int32[R]
    score: jax.Array  # float32[R]


class Partial(NamedTuple):
    """What is known of each row from a part of the vocabulary."""

    mass: Mass
    scores: jax.Array  # float32[R, k]: the largest ones, in order
    ids: jax.Array  # int32[R, k]: theirs
    hot: Mass | None = None  # of the scores over the temperature
    race: Race | None = None
    soft: jax.Array | None = None  # float32[R, D]: sum e^(z - m) of the tokens' vectors


def of_scores(
    scores: jax.Array,
    ids: jax.Array,
    *,
    top: int,
    keys: jax.Array | None = None,
    temperature: jax.Array | None = None,
    vectors: jax.Array | None = None,
) -> Partial:
    """The statistics of scores float32[R, v] of the tokens `ids` int32[v], in ascending order.

    Args:
      top: how many of the largest scores are kept (0: none); where v is less, the others are
        `LOWEST`.
      keys: uint32[R, 2], of the noise; a sample is drawn where there are any.
      temperature: float32[R, 1], positive; with `keys`.
      vectors: [v, D] of the tokens, for their mean.
    """
    mass, weights = _mass(scores)
    best, at = _largest(scores, min(top, len(ids)))
    if (lack := top - len(ids)) > 0:
        best = jnp.pad(best, ((0, 0), (0, lack)), constant_values=LOWEST)
        at = jnp.pad(at, ((0, 0), (0, lack)))
    hot = race = soft = None
    if keys is not None and temperature is not None:
        warm = jnp.where(scores > LOWEST, scores / temperature, LOWEST)
        hot, _ = _mass(warm)
        noise = gumbel(keys[:, :1], keys[:, 1:], ids.astype(jnp.uint32)[None])
        value, winner = _largest(jnp.where(scores > LOWEST, warm + noise, LOWEST), 1)
        own = jnp.take_along_axis(scores, winner, axis=1)
        race = Race(value[:, 0], ids[winner[:, 0]], own[:, 0])
    if vectors is not None:
        soft = jnp.dot(weights.astype(vectors.dtype), vectors, preferred_element_type=jnp.float32)
    return Partial(mass, best, ids[at], hot, race, soft)


def merge(a: Partial, b: Partial) -> Partial:
    """The statistics of two parts, the ids of `a` before those of `b`."""
    mass, keep, add = _merge_mass(a.mass, b.mass)
    count = a.scores.shape[1]
    scores, at = jax.lax.top_k(jnp.concatenate([a.scores, b.scores], axis=1), count)
    ids = jnp.take_along_axis(jnp.concatenate([a.ids, b.ids], axis=1), at, axis=1)
    hot = race = soft = None
    if a.hot is not None and b.hot is not None:
        hot, _, _ = _merge_mass(a.hot, b.hot)
    if a.race is not None and b.race is not None:
        later = b.race.value > a.race.value
        race = Race(*(jnp.where(later, y, x) for x, y in zip(a.race, b.race, strict=True)))
    if a.soft is not None and b.soft is not None:
        soft = keep[:, None] * a.soft + add[:, None] * b.soft
    return Partial(mass, scores, ids, hot, race, soft)


def _mass(scores: jax.Array) -> tuple[Mass, jax.Array]:
    """The sums of a part, and e^(z - m)."""
    top = scores.max(axis=1)
    below = jnp.where(scores > LOWEST, scores - top[:, None], LOWEST)
    weights = jnp.where(scores > LOWEST, jnp.exp(below), 0.0)
    return Mass(top, weights.sum(axis=1), (weights * jnp.maximum(below, -1e4)).sum(axis=1)), weights


def _merge_mass(a: Mass, b: Mass) -> tuple[Mass, jax.Array, jax.Array]:
    """The sums of both, and the factors of either."""
    top = jnp.maximum(a.top, b.top)
    keep, add = (jnp.exp(jnp.maximum(x.top - top, -1e4)) for x in (a, b))
    shifted = [x.spread + jnp.maximum(x.top - top, -1e4) * x.total for x in (a, b)]
    return (
        Mass(top, keep * a.total + add * b.total, keep * shifted[0] + add * shifted[1]),
        keep,
        add,
    )


def _largest(scores: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The largest scores [R, count], in order, and where they are; the first of equals.

    A few are found one by one, by reductions that XLA vectorises on every device.
    """
    if not 1 <= count <= 4:
        values, at = jax.lax.top_k(scores, count)
        return values, at
    size = scores.shape[1]
    index = jnp.arange(size, dtype=jnp.int32)
    values, places = [], []
    for _ in range(count):
        best = scores.max(axis=1, keepdims=True)
        first = jnp.where(scores == best, index, size).min(axis=1, keepdims=True)
        first = jnp.minimum(first, size - 1)  # of scores that are not numbers
        values.append(best)
        places.append(first)
        scores = jnp.where(index == first, LOWEST, scores)
    return jnp.concatenate(values, axis=1), jnp.concatenate(places, axis=1)
