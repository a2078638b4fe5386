"""Vocabulary attention: what a model says at a position, without the scores of all tokens.

softmax(h W) E is attention whose keys are the vocabulary's vectors W. One pass over tiles of W
gives every number that a decoder asks for; scores of shape [rows, vocabulary] never exist.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from pallas_kernels.token_stats import xla
from pallas_kernels.token_stats.partial import Partial, merge


class TokenStats(NamedTuple):
    """What a model says at each of R positions. Natural logarithms."""

    log_z: jax.Array  # float32[R]: logarithm of the sum of e^score
    entropy: jax.Array  # float32[R]: nats
    ids: jax.Array  # int32[R, k]: the most probable tokens, in order; of equals the lowest id first
    scores: jax.Array  # float32[R, k]: theirs; less `log_z`, log-probabilities
    sample: jax.Array | None = None  # int32[R]: drawn at the temperature
    sample_score: jax.Array | None = None  # float32[R]: its score, before the temperature
    hot_log_z: jax.Array | None = None  # float32[R]: as `log_z`, of scores over the temperature
    hot_entropy: jax.Array | None = None  # float32[R]: of the distribution that is drawn from
    soft: jax.Array | None = None  # float32[R, D]: mean of the tokens' vectors


def token_stats(
    hidden: Float[Array, "R D"],
    vocabulary: Float[Array, "V D"],
    *,
    bias: Float[Array, "V"] | None = None,
    scale: Float[Array, "R"] | None = None,
    soft_cap: float = 0.0,
    forbidden: tuple[int, ...] = (),
    top: int = 1,
    keys: UInt[Array, "R 2"] | None = None,
    temperature: Float[Array, ""] | Float[Array, "R"] | None = None,
    soft: bool = False,
    tile: int | None = None,
    axis_name: str | None = None,
) -> TokenStats:
    """Statistics of softmax(scores) at each row, streamed over the vocabulary.

    scores = cap(hidden @ vocabulary.T + bias) * scale, float32; forbidden tokens have none.

    Args:
      hidden: the last hidden states, after the final norm.
      vocabulary: the output projection, a vector a token (a tied head is the embedding).
      bias: of each token's score.
      scale: of each row's scores (a temperature that policies see, inverted).
      soft_cap: c in c * tanh(score / c); 0: none.
      forbidden: ids that have no probability.
      top: how many of the most probable tokens to give, 1 to 64.
      keys: of the noise of a sample, for each row (`jax.random.key_data`): the noise of token i is
        a function of (key, i) alone.
      temperature: of the sample, positive; needed with `keys`.
      soft: whether to give the mean of the vocabulary's vectors, for a next step's input.
      tile: tokens of a piece; by default the device decides. Changes rounding only.
      axis_name: inside `shard_map`, the mesh axis over which the vocabulary (and bias) is split;
        ids are those of the whole.

    Raises:
      ValueError: `top` is out of range, or `keys` and `temperature` do not come together.
    """
    if not 1 <= top <= 64:
        raise ValueError(f"top={top} must be from 1 to 64")
    if (keys is None) != (temperature is None):
        raise ValueError("`keys` and `temperature` come together")
    if tile is not None and tile < 1:
        raise ValueError(f"tile={tile} must be positive")
    rows = len(hidden)
    column = lambda x: None if x is None else jnp.broadcast_to(x, (rows,))[:, None]  # noqa: E731
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * len(vocabulary)
    with jax.named_scope("token_stats"):
        found = xla.stats(
            hidden, vocabulary, first=first, bias=bias, scale=column(scale), soft_cap=soft_cap,
            forbidden=forbidden, top=top, keys=keys, temperature=column(temperature), soft=soft,
            tile=tile,
        )  # fmt: skip
        if axis_name is not None:
            found = _gathered(found, axis_name)
        return _finished(found)


def _gathered(found: Partial, axis_name: str) -> Partial:
    """The parts of all shards, merged in their order: a few numbers a row travel, no scores."""
    parts = jax.lax.all_gather(found, axis_name)
    merged = jax.tree.map(lambda x: x[0], parts)
    for shard in range(1, jax.lax.axis_size(axis_name)):
        merged = merge(merged, jax.tree.map(lambda x, shard=shard: x[shard], parts))
    return merged


def _finished(found: Partial) -> TokenStats:
    mass, hot, race = found.mass, found.hot, found.race
    return TokenStats(
        log_z=mass.top + jnp.log(mass.total),
        entropy=jnp.log(mass.total) - mass.spread / mass.total,
        ids=found.ids,
        scores=found.scores,
        sample=None if race is None else race.id,
        sample_score=None if race is None else race.score,
        hot_log_z=None if hot is None else hot.top + jnp.log(hot.total),
        hot_entropy=None if hot is None else jnp.log(hot.total) - hot.spread / hot.total,
        soft=None if found.soft is None else found.soft / mass.total[:, None],
    )  # fmt: skip


def scores_at(
    hidden: Float[Array, "R D"],
    vocabulary: Float[Array, "V D"],
    ids: Int[Array, "R m"],
    *,
    bias: Float[Array, "V"] | None = None,
    scale: Float[Array, "R"] | None = None,
    soft_cap: float = 0.0,
) -> Float[Array, "R m"]:
    """Scores of given tokens of each row; less `log_z`, their log-probabilities.

    A product with the tokens' own vectors: it needs no pass over the vocabulary. Arguments are
    those of `token_stats`.
    """
    vectors = vocabulary[ids].astype(hidden.dtype)
    scores = jnp.einsum("rd,rmd->rm", hidden, vectors, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)[ids]
    if soft_cap:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    return scores if scale is None else scores * scale[:, None]
