"""Scores before anything reads them: temperatures that change with the step, guidance.

A shaping part has `shape(logits, step) -> logits`; it changes what policies see. The temperature of
`Sampling` changes what is drawn, and what they see with `Denoise.confidence="sampled"`.
"""

import jax
import jax.numpy as jnp

from dllm_jax.policies.commit import part, static
from dllm_jax.typing import Number


@part
class AnnealedTemperature:
    """A temperature that falls linearly from `start` towards `stop` over `steps` (DiffusionGemma).

    At step i: stop + (start - stop) * (steps - i) / steps.
    """

    start: Number = 0.8
    stop: Number = 0.4
    steps: Number = 48

    def temperature(self, step: jax.Array) -> jax.Array:
        """float32[B] at step `step` [B]."""
        left = (jnp.asarray(self.steps) - step) / self.steps
        return self.stop + (self.start - self.stop) * left

    def shape(self, logits: jax.Array, step: jax.Array) -> jax.Array:
        return logits / self.temperature(step)[:, None, None]


@part
class Forbid:
    """Tokens that are never written (LLaDA's `logits_eos_inf`: an answer that must not end)."""

    tokens: tuple[int, ...] = static(default=())

    def shape(self, logits: jax.Array, step: jax.Array) -> jax.Array:
        return logits.at[..., jnp.asarray(self.tokens, jnp.int32)].set(-jnp.inf)


@part
class Guidance:
    """Classifier-free guidance (LLaDA): scores pushed away from those without the prompt.

    logits = without + (scale + 1) * (with - without); `without` has the given tokens masked, but
    for those of `keep`. Each pass holds every row twice.
    """

    scale: Number = 1.0
    keep: jax.Array | None = None  # bool[B, P]: given tokens that both sides see (a system prompt)

    def combine(self, given: jax.Array, hidden: jax.Array) -> jax.Array:
        """Guided scores, or hidden states (they are linear), from those with and without."""
        return hidden + (self.scale + 1) * (given - hidden)


@part
class SelfConditioning:
    """Feeds the distributions of a step into the next one, as soft embeddings.

    For models trained with it (DiffusionGemma, Analog Bits): a module with `soft_embed`.
    """
