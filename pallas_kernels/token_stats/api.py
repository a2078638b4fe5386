"""Vocabulary attention: what a model says at a position, without the scores of all tokens.

softmax(h W) E is attention whose keys are the vocabulary's vectors W. One pass over tiles of W
gives every number that a decoder asks for; scores of shape [rows, vocabulary] never exist.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from pallas_kernels import platform
from pallas_kernels.token_stats import gpu, tpu, xla
from pallas_kernels.token_stats.partial import Mass, Partial, merge


class Drawn(NamedTuple):
    """A sample of each of R positions, and what it was drawn from."""

    ids: jax.Array  # int32[R]
    scores: jax.Array  # float32[R]: theirs, before the temperature
    log_z: jax.Array  # float32[R]: as in `TokenStats`, of scores over the temperature
    entropy: jax.Array  # float32[R]: nats


class TokenStats(NamedTuple):
    """What a model says at each of R positions. Natural logarithms."""

    log_z: jax.Array  # float32[R]: logarithm of the sum of e^score
    entropy: jax.Array  # float32[R]: nats
    ids: jax.Array  # int32[R, k]: the most probable tokens, in order; of equals the lowest id first
    scores: jax.Array  # float32[R, k]: theirs; less `log_z`, log-probabilities
    drawn: Drawn | None = None  # where there are keys
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
    soft: str | None = None,
    active: Bool[Array, "R"] | None = None,
    tile: int | None = None,
    axis_name: str | None = None,
    implementation: str | None = None,
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
      soft: the mean of the vocabulary's vectors, for a next step's input: "exact", or "top", that
        of the `top` most probable ones by their shares of each other, which takes no pass.
      active: rows that need an answer; those of the others are zeros. Where it pays (on CPUs, and
        from block to block of the kernel's 256 rows), they are not computed.
      tile: tokens of a piece; by default the device decides. Changes rounding only.
      axis_name: inside `shard_map`, the mesh axis over which the vocabulary (and bias) is split;
        ids are those of the whole.
      implementation: "tpu", "gpu" (the kernels), "xla", or None: the kernel of the device, where
        there is one that takes the arguments, and XLA elsewhere.

    Raises:
      ValueError: `top` or `soft` is out of range, `keys` and `temperature` do not come together,
        or the implementation that is asked for does not take the arguments.
    """
    if not 1 <= top <= 64:
        raise ValueError(f"top={top} must be from 1 to 64")
    if (keys is None) != (temperature is None):
        raise ValueError("`keys` and `temperature` come together")
    if tile is not None and tile < 1:
        raise ValueError(f"tile={tile} must be positive")
    if soft not in (None, "exact", "top"):
        raise ValueError(f"soft={soft!r} is none of None, 'exact', 'top'")
    rows = len(hidden)
    column = lambda x: None if x is None else jnp.broadcast_to(x, (rows,))[:, None]  # noqa: E731
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * len(vocabulary)
    with jax.named_scope("token_stats"):
        choice = platform.choose(
            "token_stats", implementation,
            refusal(hidden, vocabulary, tile, top=top, soft=soft == "exact"),
        )  # fmt: skip
        found = partial_stats(
            choice, hidden, vocabulary, first=first, bias=bias, scale=column(scale),
            soft_cap=soft_cap, forbidden=forbidden, top=top, keys=keys,
            temperature=column(temperature), soft=soft == "exact", active=active, tile=tile,
        )  # fmt: skip
        if axis_name is not None:
            found = gathered(found, axis_name)
        stats = _finished(found)
        if soft == "top":
            shares = jax.nn.softmax(stats.scores)
            stats = stats._replace(soft=_mean_of(shares, stats.ids, vocabulary, axis_name))
        if active is not None:
            stats = jax.tree.map(
                lambda x: jnp.where(active.reshape(-1, *[1] * (x.ndim - 1)), x, 0), stats
            )
        return stats


def refusal(hidden, vocabulary, tile, **options) -> Callable[[str], str | None]:
    """Why the kernels of "tpu" or "gpu" do not take such arguments; see `platform.choose`."""

    def of(name: str) -> str | None:
        if name == "tpu":
            return tpu.takes(hidden, vocabulary, tile)
        return gpu.takes(hidden, vocabulary, tile, **options)

    return of


def partial_stats(choice: platform.Choice, hidden, vocabulary, **options) -> Partial:
    """What the chosen implementation finds in (a shard of) the vocabulary."""
    static = {name: options.pop(name) for name in xla.STATIC if name in options}
    functions = {
        name: lambda hidden, vocabulary, options, of=of: of(hidden, vocabulary, **options, **static)
        for name, of in (("xla", xla.stats), ("tpu", tpu.stats), ("gpu", gpu.stats))
    }
    return platform.run(choice, functions, hidden, vocabulary, options)


def gathered(found: Partial, axis_name: str) -> Partial:
    """The parts of all shards, merged in their order: a few numbers a row travel, no scores.

    They travel together, as words of 32 bits: what so few of them cost is the journey.
    """
    leaves, tree = jax.tree.flatten(found)
    words = [jax.lax.bitcast_convert_type(x.reshape(len(x), -1), jnp.int32) for x in leaves]
    ends = list(itertools.accumulate(x.shape[1] for x in words))
    every = jax.lax.all_gather(jnp.concatenate(words, axis=1), axis_name)

    def part(shard: int) -> Partial:
        own = jnp.split(every[shard], ends[:-1], axis=1)
        return jax.tree.unflatten(tree, [
            jax.lax.bitcast_convert_type(x.reshape(leaf.shape), leaf.dtype)
            for x, leaf in zip(own, leaves, strict=True)
        ])  # fmt: skip

    return functools.reduce(merge, map(part, range(jax.lax.axis_size(axis_name))))


def _finished(found: Partial) -> TokenStats:
    log_z, entropy = _summed(found.mass)
    drawn = soft = None
    if found.race is not None and found.hot is not None:
        drawn = Drawn(found.race.id, found.race.score, *_summed(found.hot))
    if found.soft is not None:
        soft = found.soft / found.mass.total[:, None]
    return TokenStats(log_z, entropy, found.ids, found.scores, drawn, soft)


def _summed(mass: Mass) -> tuple[jax.Array, jax.Array]:
    """Log Z, and the entropy."""
    log_total = jnp.log(mass.total)
    return mass.top + log_total, log_total - mass.spread / mass.total


def _mean_of(shares, ids, vocabulary, axis_name: str | None) -> jax.Array:
    """The mean of tokens' vectors by their shares [R, k], float32[R, D]."""
    vectors, there = _at(vocabulary, ids, axis_name)
    mean = jnp.einsum(
        "rk,rkd->rd", jnp.where(there, shares, 0.0).astype(vectors.dtype), vectors,
        preferred_element_type=jnp.float32, precision="highest",
    )  # fmt: skip
    return mean if axis_name is None else jax.lax.psum(mean, axis_name)


def scores_at(
    hidden: Float[Array, "R D"],
    vocabulary: Float[Array, "V D"],
    ids: Int[Array, "R m"],
    *,
    bias: Float[Array, "V"] | None = None,
    scale: Float[Array, "R"] | None = None,
    soft_cap: float = 0.0,
    axis_name: str | None = None,
) -> Float[Array, "R m"]:
    """Scores of given tokens of each row; less `TokenStats.log_z`, their log-probabilities.

    A product with the tokens' own vectors: it needs no pass over the vocabulary. Arguments are
    those of `token_stats`; with `axis_name`, ids are those of the whole vocabulary, and every shard
    gets all their scores. (Where tokens are forbidden, so must the ids not be: they have scores.)
    """
    vectors, there = _at(vocabulary, ids, axis_name)
    scores = jnp.einsum(
        "rd,rmd->rm", hidden, vectors.astype(hidden.dtype), preferred_element_type=jnp.float32,
        precision="highest",
    )  # fmt: skip
    if bias is not None:
        scores = scores + _at(bias, ids, axis_name)[0].astype(jnp.float32)
    if soft_cap:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if axis_name is not None:
        scores = jax.lax.psum(jnp.where(there, scores, 0.0), axis_name)
    return scores if scale is None else scores * scale[:, None]


def _at(values, ids, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
    """The values of tokens, and which tokens this shard has: for the others there is some value."""
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * len(values)
    own = ids - first
    there = (own >= 0) & (own < len(values))
    return values[jnp.clip(own, 0, len(values) - 1)], there
