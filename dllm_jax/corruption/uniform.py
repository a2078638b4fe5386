"""Random tokens in place of tokens."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.corruption.text import WEIGHTINGS, NoisyText, flat


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["block_size", "weighting"])
@dataclasses.dataclass(frozen=True, kw_only=True)
class UniformNoise:
    """Random tokens of the whole vocabulary in place of the text's, with probability t.

    The bound in continuous time of Schiff et al. 2024 (UDLM, arXiv 2412.10193, equation 18; SEDD's
    uniform case is the same process), for a model that predicts the clean token. With V tokens,
    a = 1 - t, x = V a onehot(clean) + t and y = V a probs + t, an entry that shows token z costs,
    a unit of time,

        1 / (a V) * (V / y[z] - V / x[z] + sum over j of x[j] / x[z] log(x[j] y[z] / (x[z] y[j])))

    Times are drawn as t = u ** 2, u uniform, and weighed by 2 u: where t is small a wrong token is
    rare and costs 1 / t, and uniform times would give an infinite variance.

    Flat weights are an objective, and no bound: the cross-entropy of every position, noise or not,
    at times t ~ U(0, 1) (DiffusionGemma's fine-tuning, as NeMo AutoModel has it).
    """

    block_size: int = 0  # 0: one block, the whole text (bidirectional models)
    weighting: str = "bound"  # | "flat"

    def __post_init__(self):
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting={self.weighting!r} is neither bound nor flat")
        if self.block_size < 0:
            raise ValueError(f"block_size={self.block_size} must be positive, or 0 for all")

    def draw(
        self,
        chance: Callable[[int], Array],
        levels: Float[Array, "B G"],
        tokens: Int[Array, "B G T"],
        scored: Bool[Array, "B G T"],
        behind: Bool[Array, "B G T"],
        config: Any,
    ) -> NoisyText:
        """One sample of the noise, as `MaskNoise.draw`; what is behind the text is all noise."""
        levels = jnp.clip(levels, 1e-6, 1 - 1e-6)
        times = levels if self.weighting == "flat" else levels**2
        noised = behind | (scored & (chance(0) < times[..., None]))
        pick = (chance(1) * config.vocab_size).astype(jnp.int32)
        noisy = jnp.where(noised, jnp.minimum(pick, config.vocab_size - 1), tokens)
        weight = jnp.ones_like(levels) if self.weighting == "flat" else 2 * levels
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
        """What an entry adds to the bound, before its weight: minus the rate of its divergence."""
        if self.cross_entropy:
            return jax.nn.log_softmax(logits)[clean]
        vocab, alpha = logits.shape[-1], 1 - time
        most = vocab * alpha + time  # x of the clean token; of the others it is `time`
        logs = jnp.log(vocab * alpha * jax.nn.softmax(logits) + time)  # log y
        shown, true = logs[noisy], logs[clean]
        gap = jnp.log(most) - jnp.log(time)
        rest = logs.sum() - shown
        right = time / most * ((vocab - 1) * (shown - gap) - rest) - vocab / most
        wrong = (
            most / time * (gap + shown - true)
            + (vocab - 2) * shown - (rest - true) - vocab / time
        )  # fmt: skip
        rate = jnp.where(noisy == clean, right, wrong) + vocab / jnp.exp(shown)
        return -rate / (vocab * alpha)
