"""What to change of what a block already holds, after a step's commits.

A part with a method `revise(view) -> Revision`, or None: what is written stays.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dllm_jax.policies.commit import CommitView, grid, part, static
from dllm_jax.typing import Number


class ReviseView(NamedTuple):
    """What a reviser sees of a block of T positions."""

    commit: CommitView  # what the commit policy saw
    committed: jax.Array  # bool[B, T]: written at this step
    canvas: jax.Array  # int32[B, T]: what stood there before it
    written: jax.Array  # bool[B, T]: held a token before this step, and is not given
    logprobs: jax.Array  # float32[B, T]: of those tokens, when they were written
    uniform: jax.Array | None  # float32[B, T] in [0, 1), not those of `commit`; None: no key


class Revision(NamedTuple):
    """What is done; positions outside `view.written` are left alone."""

    replace: jax.Array  # bool[B, T]: overwritten with the step's token
    remask: jax.Array  # bool[B, T]: opened again


@part
class Replace:
    """Overwrites written tokens that the model now contradicts with confidence (LLaDA2.1)."""

    threshold: Number = 0.9

    def revise(self, view: ReviseView) -> Revision:
        new = view.commit
        replace = (new.confidence > self.threshold) & (new.tokens != view.canvas)
        return Revision(replace, jnp.zeros_like(replace))


@part
class ReNoise:
    """Nothing is written for good until the block is done: at each step every position is judged
    again, and those not accepted get random tokens (uniform diffusion; DiffusionGemma).
    """


@part
class ReMDM:
    """Re-masks written tokens with a small probability as time falls (ReMDM, 2503.00307).

    Both parts of a recipe, `commit` and `revise`: as a position may be masked again, masked ones
    are revealed a little faster, so that the marginals stay those of the masked process (but with
    `by_confidence`, which re-masks little). With
    a_t = 1 - t, sigma_max = min(1, (1 - a_s) / a_t):

    * schedule "cap": sigma = min(eta, sigma_max); "rescale": sigma = eta * sigma_max;
    * `by_confidence`: sigma is shared out by softmax(-p), p of the token when it was written.
    """

    steps: Number = 32
    eta: Number = 0.02
    schedule: str = static(default="cap")
    by_confidence: bool = static(default=False)

    def __post_init__(self):
        if self.schedule not in ("cap", "rescale"):
            raise ValueError(f"schedule={self.schedule!r} is neither cap nor rescale")

    def sigma(self, step: jax.Array) -> jax.Array:
        """float32[B]: probability that a written token is masked again at this step."""
        t, s = grid(step, self.steps, 0.0), grid(step + 1, self.steps, 0.0)
        most = jnp.minimum(1.0, s / jnp.maximum(1 - t, 1e-9))
        if self.schedule == "cap":
            return jnp.minimum(self.eta, most)
        return self.eta * most

    def commit(self, view: CommitView) -> jax.Array:
        t, s = grid(view.step, self.steps, 0.0), grid(view.step + 1, self.steps, 0.0)
        # Shared out by confidence, re-masking is rare, and the published code reveals as without.
        sigma = 0.0 if self.by_confidence else self.sigma(view.step)
        reveal = ((1 - s) - (1 - sigma) * (1 - t)) / t
        reveal = jnp.where(view.step >= jnp.asarray(self.steps) - 1, 1.0, reveal)
        return view.masked & (view.rank("random") < reveal[:, None])

    def revise(self, view: ReviseView) -> Revision:
        if view.uniform is None:
            raise ValueError("re-masking is random and needs a key")
        sigma = self.sigma(view.commit.step)[:, None]
        if self.by_confidence:
            share = jax.nn.softmax(
                jnp.where(view.written, -jnp.exp(view.logprobs), -jnp.inf), axis=-1
            )
            sigma = sigma * jnp.where(view.written, share, 0.0)
        remask = view.uniform < sigma
        last = view.commit.step >= jnp.asarray(self.steps) - 1
        return Revision(jnp.zeros_like(remask), remask & ~last[:, None])
