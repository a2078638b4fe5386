"""Noise: which tokens of a text a model must restore, and what it sees of them.

`MaskedBlocks` is for training; `MaskNoise` and `UniformNoise` are the terms of a likelihood bound.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.typing import Key, Number


class NoisyBlocks(NamedTuple):
    """The noisy stream of a dual-stream batch: a row has G blocks of T entries, Q = G * T."""

    tokens: jax.Array  # int32[B, Q]: the text with masks in it
    positions: jax.Array  # int32[B, Q]
    prefix: jax.Array  # int32[B, Q]: the block's start; the clean tokens before it are visible
    targets: jax.Array  # int32[B, Q]: what the output should be (shifted: the next token)
    weights: jax.Array  # float32[B, Q]: 0 where there is nothing to learn
    whole: jax.Array  # bool[B, Q]: entries of blocks that are all masks


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedBlocks:
    """Blocks of mask noise, tiled over the answer of each row.

    Blocks lie side by side from a random offset and wrap around the answer, so that every answer
    token is covered about equally often, at every place in a block. A share of the blocks is all
    masks: what a drafter sees, and a fresh canvas. In the others the first token is masked (a
    canvas begins at the first unwritten position), and each other one with the block's own
    probability t ~ U(0, 1).
    """

    block_size: int = 4
    blocks: int = 32  # noisy blocks for each row and pass
    whole: float = 0.6  # share of blocks that are all masks
    decay: float = 1.0  # weight of an entry j places into its block: decay ** j

    def __post_init__(self):
        if self.block_size < 1 or self.blocks < 1 or not 0 <= self.whole <= 1:
            raise ValueError(f"needs block_size, blocks >= 1 and whole in [0, 1], got {self}")

    def draw(
        self,
        key: Key,
        tokens: Int[Array, "B L"],
        lengths: Int[Array, "B"],
        prompts: Int[Array, "B"],
        mask_id: int,
    ) -> NoisyBlocks:
        """The noisy stream of one batch. Targets are shifted: entry i learns token i + 1."""
        batch, size = tokens.shape[0], self.block_size
        offset_key, whole_key, level_key, mask_key = jax.random.split(key, 4)
        # A block may start anywhere before the last token.
        span = jnp.maximum(lengths - 1 - prompts, 1)
        offset = jax.random.randint(offset_key, (batch, 1), 0, 1 << 20)
        starts = prompts[:, None] + (offset + jnp.arange(self.blocks) * size) % span[:, None]

        shape = (batch, self.blocks, size)
        place = jnp.arange(size)
        positions = starts[..., None] + place
        whole = jax.random.uniform(whole_key, (*shape[:2], 1)) < self.whole
        level = jax.random.uniform(level_key, (*shape[:2], 1))
        masked = whole | (place == 0) | (jax.random.uniform(mask_key, shape) < level)
        masked |= positions >= lengths[:, None, None]  # a decoder never sees behind the end

        def at(index):
            flat = jnp.minimum(index, tokens.shape[1] - 1).reshape(batch, -1)
            return jnp.take_along_axis(tokens, flat, axis=1).reshape(shape)

        # An entry learns what its block hides from it: a masked target. The token behind the block
        # is hidden from all of it, and drafted by the last entry when that is a mask itself.
        hidden = jnp.concatenate([masked[..., 1:], masked[..., -1:]], axis=-1)
        learns = (
            hidden
            & (positions + 1 < lengths[:, None, None])
            & (prompts < lengths - 1)[:, None, None]
        )
        weights = jnp.where(learns, self.decay**place, 0.0)

        def flat(x):
            return jnp.broadcast_to(x, shape).reshape(batch, -1)

        return NoisyBlocks(
            tokens=flat(jnp.where(masked, mask_id, at(positions))),
            positions=flat(positions),
            prefix=flat(starts[..., None]),
            targets=flat(at(positions + 1)),
            weights=flat(weights),
            whole=flat(whole),
        )


class NoisyText(NamedTuple):
    """Texts under noise for one sample of a bound, in G blocks of T entries, Q = G * T."""

    tokens: jax.Array  # int32[B, Q]: what the model sees
    times: jax.Array  # float32[B, Q]: noise level of the entry's block
    weights: jax.Array  # float32[B, Q]: of the entry's nats; 0 where nothing is to be restored


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["beta", "omega"],
    meta_fields=["block_size", "counts"],
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
    """

    block_size: int = 0  # 0: one block, the whole text (bidirectional models)
    counts: str = "exact"
    beta: Number = 0.0
    omega: Number = 1.0

    def __post_init__(self):
        if self.counts not in ("exact", "independent"):
            raise ValueError(f"counts={self.counts!r} is neither exact nor independent")
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
            times = self.beta + (self.omega - self.beta) * levels
            masked = scored & (chance(0) < times[..., None])
        weights = jnp.where(masked, 1 / jnp.where(masked, times[..., None], 1.0), 0.0)
        noisy = jnp.where(masked | behind, config.mask_id, tokens)
        return _flat(noisy, times, weights)

    def score(
        self,
        logits: Float[Array, "V"],
        clean: Int[Array, ""],
        noisy: Int[Array, ""],
        time: Float[Array, ""],
    ) -> Float[Array, ""]:
        """What an entry adds to the bound, before its weight: the clean token's log-probability."""
        return jax.nn.log_softmax(logits)[clean]


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["block_size"])
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
    """

    block_size: int = 0  # 0: one block, the whole text (bidirectional models)

    def __post_init__(self):
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
        times = levels**2
        noised = behind | (scored & (chance(0) < times[..., None]))
        pick = (chance(1) * config.vocab_size).astype(jnp.int32)
        noisy = jnp.where(noised, jnp.minimum(pick, config.vocab_size - 1), tokens)
        return _flat(noisy, times, jnp.where(scored, 2 * levels[..., None], 0.0))

    def score(
        self,
        logits: Float[Array, "V"],
        clean: Int[Array, ""],
        noisy: Int[Array, ""],
        time: Float[Array, ""],
    ) -> Float[Array, ""]:
        """What an entry adds to the bound, before its weight: minus the rate of its divergence."""
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


def _flat(noisy, times, weights) -> NoisyText:
    """Blocks [B, G, T], with times [B, G], side by side."""
    times = jnp.broadcast_to(times[..., None], noisy.shape)
    flat = lambda x: x.reshape(len(x), -1)  # noqa: E731
    return NoisyText(flat(noisy), flat(times), flat(weights))
