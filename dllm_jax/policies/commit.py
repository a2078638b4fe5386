"""Which masked positions of a canvas to write at a denoising step.

A policy is any pytree with a method `commit(view) -> bool[B, T]`; there is no base class. The loop
writes the canvas's first position at every step, as the causal mode would, and asks the policy
about the masked ones behind it: one that picks none of them decodes a token at a time.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dllm_jax.typing import Number


class CommitView(NamedTuple):
    """What a policy sees of a block of T positions."""

    probs: jax.Array  # float32[B, T, V]: the model's own, before any temperature
    tokens: jax.Array  # int32[B, T]: the token that would be written
    confidence: jax.Array  # float32[B, T]: its probability among `probs`
    masked: jax.Array  # bool[B, T]: positions that may be written


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConfidenceThreshold:
    """Every position whose token has a probability over the threshold (Fast-dLLM, section 3.3)."""

    threshold: Number = 0.9

    def commit(self, view: CommitView) -> jax.Array:
        return view.masked & (view.confidence > self.threshold)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EntropyBound:
    """The largest set of low entropy whose joint error is bounded (EB-sampler, 2505.24857).

    Positions in order of entropy are taken while the sum of entropies, less the largest, is at most
    `bound` (nats).
    """

    bound: Number = 0.1

    def commit(self, view: CommitView) -> jax.Array:
        logs = jnp.log(jnp.maximum(view.probs, jnp.finfo(jnp.float32).tiny))
        entropy = jnp.where(view.masked, -(view.probs * logs).sum(axis=-1), jnp.inf)
        order = jnp.argsort(entropy, axis=-1)
        ranked = jnp.take_along_axis(entropy, order, axis=-1)
        taken = jnp.cumsum(ranked, axis=-1) - ranked <= self.bound
        rank = jnp.argsort(order, axis=-1)
        return view.masked & jnp.take_along_axis(taken, rank, axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quota:
    """The `count` most confident positions (LLaDA's low-confidence remasking)."""

    count: Number = 1

    def commit(self, view: CommitView) -> jax.Array:
        confidence = jnp.where(view.masked, view.confidence, -jnp.inf)
        rank = jnp.argsort(jnp.argsort(-confidence, axis=-1), axis=-1)
        return view.masked & (rank < self.count)
