"""Masks in place of tokens."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.corruption.schedules import Linear, Schedule, rate
from dllm_jax.corruption.text import WEIGHTINGS, NoisyText, flat
from dllm_jax.typing import Number


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["beta", "omega"],
    meta_fields=["block_size", "counts", "schedule", "weighting"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskNoise:
    """Masks over the scored positions, each block of them at a noise level of its own.

    * counts "exact": of n scored positions of a block, l ~ U{1..n} are masked, weight n / l (LLaDA,
      2502.09992, equation 6 and algorithm 3).
    * counts "independent": each is masked with probability t ~ U(beta, omega), weight 1 / t (MDLM,
      2406.07524, equation 11; by blocks, with clipped schedules: BD3-LM, 2503.09573, equation 8).

    Both have the same mean over (0, 1), and "exact" is the other with t integrated out: no variance
    from t, while 1 / t has an infinite one. A clipped schedule, [beta, omega] other than [0, 1],
    is a training objective: its mean is no bound, but in blocks of one, where any gives the exact
    likelihood (each count is 1, or each probability cancels its weight).

    Other schedules draw a share p of masks for a time t ~ U(0, 1), and weigh by p' / p (MD4,
    2406.04329, equation 5): the same mean. Flat weights, 1 for each mask, are an objective too
    (Fast-dLLM v2; LLaDA2's fine-tuning, in a band of shares): no bound.
    """

    block_size: int = 0  # 0: one block, the whole text (bidirectional models)
    counts: str = "exact"
    beta: Number = 0.0
    omega: Number = 1.0
    schedule: Schedule = Linear()  # for counts "independent"; `beta` and `omega` squeeze it
    weighting: str = "bound"  # | "flat"

    def __post_init__(self):
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting={self.weighting!r} is neither bound nor flat")
        if self.counts not in ("exact", "independent"):
            raise ValueError(f"counts={self.counts!r} is neither exact nor independent")
        if self.counts == "exact" and self.schedule != Linear():
            raise ValueError('another schedule needs counts="independent": exact counts have none')
        if self.block_size < 0:
            raise ValueError(f"block_size={self.block_size} must be positive, or 0 for all")
        if not all(isinstance(x, int | float) for x in (self.beta, self.omega)):
            return
        if not 0 <= self.beta <= self.omega <= 1:
            raise ValueError(f"needs 0 <= beta <= omega <= 1, got {self.beta}, {self.omega}")
        if self.counts == "exact" and (self.beta, self.omega) != (0, 1):
            raise ValueError('a clipped schedule needs counts="independent"')

    def draw(
        self,
        chance: Callable[[int], Array],
        levels: Float[Array, "B G"],
        tokens: Int[Array, "B G T"],
        scored: Bool[Array, "B G T"],
        behind: Bool[Array, "B G T"],
        config: Any,
    ) -> NoisyText:
        """One sample of the noise.

        Args:
          chance: `chance(stream)` is float32[B, G, T], uniform in [0, 1), and independent of that
            of another stream.
          levels: uniform in [0, 1].
          tokens: the clean text.
          scored: positions whose tokens the bound is about; the others are given.
          behind: positions behind the text, of which nothing is known: they stay masks.
          config: the model's.
        """
        total = scored.sum(axis=-1)
        if self.counts == "exact":
            count = jnp.clip(jnp.floor(levels * total).astype(jnp.int32) + 1, 1, total)
            order = jnp.argsort(jnp.where(scored, chance(0), 2.0), axis=-1)
            masked = scored & (jnp.argsort(order, axis=-1) < count[..., None])
            times = count / jnp.maximum(total, 1)
        else:
            times = self.beta + (self.omega - self.beta) * self.schedule.share(levels)
            masked = scored & (chance(0) < times[..., None])
        if self.weighting == "flat":
            weights = masked.astype(jnp.float32)
        else:
            grows = 1.0 if self.schedule == Linear() else rate(self.schedule, levels)
            weight = grows / jnp.where(masked.any(axis=-1), times, 1.0)
            weights = jnp.where(masked, weight[..., None], 0.0)
        noisy = jnp.where(masked | behind, config.mask_id, tokens)
        return flat(noisy, times, weights)

    def complement(
        self,
        noisy: NoisyText,
        tokens: Int[Array, "B G T"],
        scored: Bool[Array, "B G T"],
        behind: Bool[Array, "B G T"],
        config: Any,
    ) -> NoisyText:
        """The sample in which just the other scored tokens are masked (Fast-dLLM v2, 2509.26328).

        Of flat weights; or of the bound's, where it is a sample of the noise too, at 1 - p.

        Raises:
          ValueError: it is none.
        """
        even = self.schedule == Linear()
        if all(isinstance(x, int | float) for x in (self.beta, self.omega)):
            even = even and round(self.beta + self.omega, 6) == 1
        if self.weighting == "bound" and not (self.counts == "independent" and even):
            raise ValueError(
                f'the complement is no sample of {self}: give weighting="flat", or'
                ' counts="independent" with a linear schedule and beta + omega = 1'
            )
        fold = lambda x: x.reshape(tokens.shape)  # noqa: E731
        masked = scored & (fold(noisy.weights) == 0)
        times = 1 - fold(noisy.times)[..., 0]
        weights = masked.astype(jnp.float32)
        if self.weighting == "bound":
            weights = weights / jnp.where(masked, times[..., None], 1.0)
        return flat(jnp.where(masked | behind, config.mask_id, tokens), times, weights)

    @property
    def cross_entropy(self) -> bool:
        """Whether `score` is the clean token's log-probability, which needs no scores at hand."""
        return True

    def score(
        self,
        logits: Float[Array, "V"],
        clean: Int[Array, ""],
        noisy: Int[Array, ""],
        time: Float[Array, ""],
    ) -> Float[Array, ""]:
        """What an entry adds to the bound, before its weight: the clean token's log-probability."""
        return jax.nn.log_softmax(logits)[clean]
