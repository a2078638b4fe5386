"""Masks and random tokens mixed."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.corruption.text import WEIGHTINGS, NoisyText, flat


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[],
    meta_fields=["block_size", "uniform", "weighting", "clamp"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedNoise:
    """Masks, and in between random tokens: GIDD (von Rütte et al. 2025, arXiv 2503.04482).

    At time t a token stays with probability a, is a mask with m, and random with r:

        c = B sqrt(t (1 - t)),  a = (1 - t) / (1 + c),  m = t / (1 + c),  r = c / (1 + c)

    with B such that r = `uniform` at t = 1/2 (equations 6 and 7, gamma 1). Random tokens are all
    of the vocabulary but the mask. A token z where x was, q(z) its probability then and p(z) that
    of the model's guess of x under the same noise, costs, a unit of time (theorem 1),

        w (KL(q || p) + q(z) / p(z) - log(q(z) / p(z)) - 1),   w = rate(z) / q(z)

    where rate(z) is how fast any other token becomes z. At `uniform=0` it is `MaskNoise`. A random
    token is rare where t is small, and its w large: times are drawn as t = u ** 4, u uniform, and
    weighed by 4 u ** 3, for the variance is infinite else. `clamp` bounds w: no bound any more.

    Flat weights are an objective: the cross-entropy of every position, at times t ~ U(0, 1).
    """

    block_size: int = 0  # 0: one block, the whole text (bidirectional models)
    uniform: float = 0.2  # share of random tokens in the middle
    weighting: str = "bound"  # | "flat": the cross-entropy of every position
    clamp: float = 0.0  # the most that w may be; 0: as it is

    def __post_init__(self):
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting={self.weighting!r} is neither bound nor flat")
        if not 0 <= self.uniform < 1:
            raise ValueError(f"uniform={self.uniform} must be in [0, 1)")
        if self.block_size < 0 or self.clamp < 0:
            raise ValueError(f"block_size and clamp must not be negative, got {self}")

    def shares(self, t: Float[Array, "*B"]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The probabilities that a token stays, is a mask, and is random, at a time in (0, 1)."""
        c = 2 * self.uniform / (1 - self.uniform) * jnp.sqrt(t * (1 - t))
        return (1 - t) / (1 + c), t / (1 + c), c / (1 + c)

    def draw(
        self,
        chance: Callable[[int], Array],
        levels: Float[Array, "B G"],
        tokens: Int[Array, "B G T"],
        scored: Bool[Array, "B G T"],
        behind: Bool[Array, "B G T"],
        config: Any,
    ) -> NoisyText:
        """One sample of the noise, as `MaskNoise.draw`; what is behind the text is all masks."""
        levels = jnp.clip(levels, 1e-2, 1 - 1e-4)
        flat_times = self.weighting == "flat"
        times = levels if flat_times else levels**4
        stays, masks, _ = (x[..., None] for x in self.shares(times))
        turn = chance(0)
        pick = (chance(1) * (config.vocab_size - 1)).astype(jnp.int32)
        pick = jnp.minimum(pick, config.vocab_size - 2)
        pick = pick + (pick >= config.mask_id)  # any token but the mask
        noisy = jnp.where(turn < stays + masks, config.mask_id, pick)
        noisy = jnp.where(scored & (turn >= stays), noisy, tokens)
        noisy = jnp.where(behind, config.mask_id, noisy)
        weight = jnp.ones_like(levels) if flat_times else 4 * levels**3
        return flat(noisy, times, jnp.where(scored, weight[..., None], 0.0))

    @property
    def cross_entropy(self) -> bool:
        """Whether `score` is the clean token's log-probability."""
        return self.weighting == "flat"

    def score(
        self,
        logits: Float[Array, "V"],
        clean: Int[Array, ""],
        noisy: Int[Array, ""],
        time: Float[Array, ""],
    ) -> Float[Array, ""]:
        """What an entry adds to the bound, before its weight: minus the rate of its divergence.

        The mask token is the one at minus infinity in `logits`.
        """
        if self.cross_entropy:
            return jax.nn.log_softmax(logits)[clean]
        (stays, masks, random), grows = jax.jvp(self.shares, (time,), (jnp.ones_like(time),))
        is_mask = logits == -jnp.inf
        count = logits.shape[-1] - is_mask.sum()
        each = jnp.where(is_mask, masks, random / count)  # of a token that the noise makes
        true = each + stays * jax.nn.one_hot(clean, logits.shape[-1])
        guess = each + stays * jax.nn.softmax(logits)
        safe = lambda x: jnp.log(jnp.where(x > 0, x, 1.0))  # noqa: E731
        apart = (true * (safe(true) - safe(guess))).sum()
        ratio = true[noisy] / guess[noisy]
        shown = jnp.where(is_mask[noisy], grows[1], grows[2] / count)
        rate = shown - grows[0] / stays * each[noisy]
        weight = rate / true[noisy]
        if self.clamp:
            weight = jnp.minimum(weight, self.clamp)
        return -weight * (apart + ratio - jnp.log(ratio) - 1)
