"""Blocks of masks at random places of an answer: what a dual stream learns from."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dllm_jax.typing import Key


class NoisyBlocks(NamedTuple):
    """The noisy stream of a dual-stream batch: a row has G blocks of T entries, Q = G * T."""

    tokens: jax.Array  # int32[B, Q]: the text with masks in it
    positions: jax.Array  # int32[B, Q]
    prefix: jax.Array  # int32[B, Q]: the block's start; the clean tokens before it are visible
    targets: jax.Array  # int32[B, Q]: what the output should be (shifted: the next token)
    weights: jax.Array  # float32[B, Q]: 0 where there is nothing to learn
    whole: jax.Array  # bool[B, Q]: entries of blocks that are all masks
    times: jax.Array  # float32[B, Q]: the probability of a mask in the entry's block


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
            times=flat(jnp.where(whole, 1.0, level)),
        )
