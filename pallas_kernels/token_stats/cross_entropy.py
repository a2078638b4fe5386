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

from pallas_kernels import platform
from pallas_kernels.token_stats import cross_entropy_tpu
from pallas_kernels.token_stats.api import partial_stats, refusal, scores_at
from pallas_kernels.token_stats.partial import LOWEST
from pallas_kernels.token_stats.reference import scores_of, without

_SCORES = 1 << 23  # elements of a tile of scores, 32 MiB


class CrossEntropy(NamedTuple):
    """What the model makes of each target."""

    nats: jax.Array  # float32[R]
    best: jax.Array  # int32[R]: the most probable token, which has no gradient


class _Static(NamedTuple):
    soft_cap: float
    forbidden: tuple[int, ...]
    tile: int | None
    choice: platform.Choice


class _Found(NamedTuple):
    """Of each row, from the tokens that are here."""

    log_z: jax.Array  # float32[R]
    own: jax.Array  # float32[R]: the target's score; 0 where it is not here
    # Without gradients
    best: jax.Array  # float32[R]: the largest score
    id: jax.Array  # int32[R]: whose it is


def cross_entropy(
    hidden: Float[Array, "R D"],
    vocabulary: Float[Array, "V D"],
    targets: Int[Array, "R"],
    *,
    bias: Float[Array, "V"] | None = None,
    soft_cap: float = 0.0,
    forbidden: tuple[int, ...] = (),
    tile: int | None = None,
    axis_name: str | None = None,
    implementation: str | None = None,
) -> CrossEntropy:
    """Nats of each target, -log softmax(scores)[target]; differentiable.

    Scores are those of `token_stats`. Gradients go to `hidden`, `vocabulary` and `bias`, in their
    dtypes; those of the vocabulary are summed over the rows in float32.

    Args:
      targets: ids, none of them forbidden.
      tile: tokens of a piece; by default from the number of rows. Changes rounding only.
      axis_name: inside `shard_map`, the mesh axis over which the vocabulary (and bias) is split;
        targets are ids of the whole. Gradients are right where they are taken of the `shard_map`,
        with `check_vma=False`, not inside of it.
      implementation: "tpu" (kernels, which keep the scores of a tile in VMEM), "gpu" (a kernel for
        log Z; the gradient is XLA's), "xla", or None: those of the device, where there are any that
        take the arguments, and XLA elsewhere.

    Raises:
      ValueError: `tile` is not positive, or the implementation that is asked for does not take the
        arguments.
    """
    if tile is not None and tile < 1:
        raise ValueError(f"tile={tile} must be positive")
    choice = platform.choose("cross_entropy", implementation, refusal(hidden, vocabulary, tile))
    static = _Static(soft_cap, tuple(forbidden), tile, choice)
    first = jnp.int32(0)
    if axis_name is not None:
        first = jax.lax.axis_index(axis_name) * len(vocabulary)
    with jax.named_scope("cross_entropy"):
        found = _scored(static, hidden, vocabulary, bias, targets, first)
        if axis_name is not None:
            found = _merged(found, axis_name)
        return CrossEntropy(found.log_z - found.own, found.id)


def _merged(found: _Found, axis_name: str) -> _Found:
    """Of the whole vocabulary, from its shards: a few numbers a row travel."""
    top = jax.lax.pmax(jax.lax.stop_gradient(found.log_z), axis_name)
    log_z = top + jnp.log(jax.lax.psum(jnp.exp(found.log_z - top), axis_name))
    score = jax.lax.stop_gradient(found.best)
    best = jax.lax.pmax(score, axis_name)
    beaten = jnp.int32(0x7FFFFFFF)
    token = jax.lax.pmin(jnp.where(score == best, found.id, beaten), axis_name)
    return _Found(log_z, jax.lax.psum(found.own, axis_name), best, token)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scored(static: _Static, hidden, vocabulary, bias, targets, first) -> _Found:
    return _forward(static, hidden, vocabulary, bias, targets, first)[0]


def _forward(static: _Static, hidden, vocabulary, bias, targets, first):
    found = partial_stats(
        static.choice, hidden, vocabulary, first=first, bias=bias, soft_cap=static.soft_cap,
        forbidden=static.forbidden, top=1, tile=static.tile,
    )  # fmt: skip
    # A shard whose tokens are all forbidden has no mass: a finite logarithm of it adds none.
    log_z = found.mass.top + jnp.log(jnp.maximum(found.mass.total, jnp.finfo(jnp.float32).tiny))
    at = targets - first
    there = (at >= 0) & (at < len(vocabulary))
    at = jnp.clip(at, 0, len(vocabulary) - 1)[:, None]
    own = scores_at(hidden, vocabulary, at, bias=bias, soft_cap=static.soft_cap)[:, 0]
    found = _Found(log_z, jnp.where(there, own, 0.0), found.scores[:, 0], found.ids[:, 0])
    return found, (hidden, vocabulary, bias, targets, first, log_z)


def _backward(static: _Static, saved, grad: _Found):
    slopes = partial(_slopes, static)
    functions = {"xla": slopes, "tpu": partial(_kernels, static), "gpu": slopes}
    found = platform.run(static.choice, functions, *saved, grad.log_z, grad.own)
    return (*found, None, None)


_scored.defvjp(_forward, _backward)


def _kernels(static: _Static, hidden, vocabulary, bias, targets, first, log_z, d_log_z, d_own):
    return cross_entropy_tpu.slopes(
        hidden, vocabulary, bias, targets, first, log_z, d_log_z, d_own,
        soft_cap=static.soft_cap, forbidden=static.forbidden, tile=static.tile,
    )  # fmt: skip


def _slopes(static: _Static, hidden, vocabulary, bias, targets, first, log_z, d_log_z, d_own):
    """Gradients of the hidden states, the vocabulary and the bias, in their dtypes."""
    count = len(vocabulary)
    tile = min(static.tile or max(_SCORES // max(len(hidden), 1) // 128 * 128, 128), count)

    def step(i, sums):
        d_hidden, d_vocabulary, d_bias = sums
        start = jnp.minimum(i * tile, count - tile)  # the last tile may overlap the one before
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=tile)
        vectors = cut(vocabulary).astype(hidden.dtype)
        place = start + jnp.arange(tile)
        scores = scores_of(
            hidden, vectors, bias=None if bias is None else cut(bias), soft_cap=static.soft_cap
        )
        allowed = without(scores, first + place, static.forbidden)
        share = jnp.where(allowed > LOWEST, jnp.exp(allowed - log_z[:, None]), 0.0)
        slope = share * d_log_z[:, None]
        slope += jnp.where(first + place == targets[:, None], d_own[:, None], 0.0)
        if static.soft_cap:
            slope = slope * (1 - (scores / static.soft_cap) ** 2)
        slope = jnp.where(place >= i * tile, slope, 0.0)
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
    return d_hidden.astype(hidden.dtype), d_vocabulary, d_bias


def _added(into: jax.Array, own: jax.Array, start: jax.Array) -> jax.Array:
    """`into` with `own` added from `start` on."""
    before = jax.lax.dynamic_slice_in_dim(into, start, len(own))
    return jax.lax.dynamic_update_slice_in_dim(into, before + own.astype(into.dtype), start, 0)
