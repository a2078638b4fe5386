"""Cross-entropy against the vocabulary, forward and backward, without the scores of all tokens.

With z = h W, the gradient of -log p(target) is softmax(z) - onehot(target) in the scores: each tile
of it is made again in the backward pass from log Z, which is all that the forward pass keeps
(the "cut" cross-entropy: Wijmans et al. 2024, arXiv 2411.09009).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.token_stats import xla
from pallas_kernels.token_stats.api import scores_at
from pallas_kernels.token_stats.reference import scores_of, without

_SCORES = 1 << 23  # elements of a tile of scores, 32 MiB


class CrossEntropy(NamedTuple):
    """What the model makes of each target."""

    nats: jax.Array  # float32[R]
    best: jax.Array  # int32[R]: the most probable token, which has no gradient


def cross_entropy(
    hidden: Float[Array, "R D"],
    vocabulary: Float[Array, "V D"],
    targets: Int[Array, "R"],
    *,
    bias: Float[Array, "V"] | None = None,
    soft_cap: float = 0.0,
    forbidden: tuple[int, ...] = (),
    tile: int | None = None,
) -> CrossEntropy:
    """Nats of each target, -log softmax(scores)[target]; differentiable.

    Scores are those of `token_stats`. Gradients go to `hidden`, `vocabulary` and `bias`, in their
    dtypes; those of the vocabulary are summed over the rows in float32.

    Args:
      targets: ids, none of them forbidden.
      tile: tokens of a piece; by default from the number of rows. Changes rounding only.
    """
    if tile is not None and tile < 1:
        raise ValueError(f"tile={tile} must be positive")
    with jax.named_scope("cross_entropy"):
        return _scored(soft_cap, tuple(forbidden), tile, hidden, vocabulary, bias, targets)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _scored(soft_cap, forbidden, tile, hidden, vocabulary, bias, targets):
    return _forward(soft_cap, forbidden, tile, hidden, vocabulary, bias, targets)[0]


def _forward(soft_cap, forbidden, tile, hidden, vocabulary, bias, targets):
    found = xla.stats(
        hidden, vocabulary, bias=bias, soft_cap=soft_cap, forbidden=forbidden, top=1, tile=tile
    )
    log_z = found.mass.top + jnp.log(found.mass.total)
    own = scores_at(hidden, vocabulary, targets[:, None], bias=bias, soft_cap=soft_cap)[:, 0]
    found = CrossEntropy(log_z - own, found.ids[:, 0])
    return found, (hidden, vocabulary, bias, targets, log_z)


def _backward(soft_cap, forbidden, tile, saved, grad):
    hidden, vocabulary, bias, targets, log_z = saved
    grad = grad.nats
    count = len(vocabulary)
    tile = min(tile or max(_SCORES // max(len(hidden), 1) // 128 * 128, 128), count)

    def step(i, sums):
        d_hidden, d_vocabulary, d_bias = sums
        start = jnp.minimum(i * tile, count - tile)  # the last tile may overlap the one before
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=tile)
        vectors = cut(vocabulary).astype(hidden.dtype)
        ids = start + jnp.arange(tile)
        scores = scores_of(
            hidden, vectors, bias=None if bias is None else cut(bias), soft_cap=soft_cap
        )
        share = jnp.exp(without(scores, ids, forbidden) - log_z[:, None])
        slope = (share - (ids == targets[:, None])) * grad[:, None]
        if soft_cap:
            slope = slope * (1 - (scores / soft_cap) ** 2)
        slope = jnp.where(ids >= i * tile, slope, 0.0)
        narrow = slope.astype(hidden.dtype)
        d_hidden += jnp.dot(narrow, vectors, preferred_element_type=jnp.float32)
        own = jnp.dot(narrow.T, hidden, preferred_element_type=jnp.float32)
        d_vocabulary = _added(d_vocabulary, own, start)
        if d_bias is not None:
            d_bias = _added(d_bias, slope.sum(axis=0), start)
        return d_hidden, d_vocabulary, d_bias

    zeros = (
        jnp.zeros(hidden.shape, jnp.float32),
        jnp.zeros_like(vocabulary),
        None if bias is None else jnp.zeros_like(bias),
    )
    d_hidden, d_vocabulary, d_bias = jax.lax.fori_loop(0, -(-count // tile), step, zeros)
    return d_hidden.astype(hidden.dtype), d_vocabulary, d_bias, None


_scored.defvjp(_forward, _backward)


def _added(into: jax.Array, own: jax.Array, start: jax.Array) -> jax.Array:
    """`into` with `own` added from `start` on."""
    before = jax.lax.dynamic_slice_in_dim(into, start, len(own))
    return jax.lax.dynamic_update_slice_in_dim(into, before + own.astype(into.dtype), start, 0)
