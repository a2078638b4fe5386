"""Who may attend to whom, as arithmetic on indices: never an array on the fast path.

The entries of one forward pass are `clean` ones first (tokens that are decided: the prompt, a
finished block, drafts under verification) and noisy ones after (a canvas), the latter in groups of
`block`:

    index   0 ... clean-1 | clean ... clean+block-1 | clean+block ... | ...
    stream  clean         | noisy group 0           | noisy group 1   | ...

A query attends to the clean keys before its `clean_end`, and, when it is noisy, to its own group
in both directions. Nobody attends to another group, and clean queries never attend to noise. Every
attention pattern of the field is a choice of these numbers:

    causal                  no groups, clean_end = i + 1
    bidirectional           no groups, clean_end = length
    block-causal            no groups, clean_end = the end of i's block
    dual stream             group g sees the clean blocks before it: clean_end = g * stride + offset
                            (`repeat` groups in turn see the same: g is then g // repeat)
    block-diagonal          no clean entries: the prefix is in a cache
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockMask:
    """A mask spec, hashable. Build one with the constructors below."""

    clean: int  # clean entries, first
    clean_block: int = 1  # how clean entries see each other: 1 causal, `clean` bidirectional
    block: int = 0  # entries of one noisy group; 0 when there is no noise
    stride: int = 0  # noisy group g sees the clean entries before g * stride + offset
    offset: int = 0
    repeat: int = 1  # so many groups in turn see the same: g // repeat in the place of g

    def __post_init__(self):
        if self.clean < 0 or self.clean_block < 1 or self.block < 0 or self.repeat < 1:
            raise ValueError(
                f"a mask needs clean >= 0, clean_block >= 1, block >= 0 and repeat >= 1, got {self}"
            )

    @staticmethod
    def causal(length: int) -> "BlockMask":
        """Entry i sees entries 0..i."""
        return BlockMask(clean=length)

    @staticmethod
    def bidirectional(length: int) -> "BlockMask":
        """Every entry sees every entry."""
        return BlockMask(clean=length, clean_block=max(length, 1))

    @staticmethod
    def block_causal(length: int, block: int) -> "BlockMask":
        """Entry i sees all entries up to the end of its own block of `block`."""
        return BlockMask(clean=length, clean_block=block)

    @staticmethod
    def block_diagonal(block: int) -> "BlockMask":
        """Noisy groups alone; the clean tokens that they read are in a cache."""
        return BlockMask(clean=0, block=block)

    @staticmethod
    def dual_stream(
        clean: int,
        block: int,
        *,
        stride: int | None = None,
        offset: int = 0,
        clean_block: int = 1,
        repeat: int = 1,
    ) -> "BlockMask":
        """`[clean ; noisy groups]`: group g sees the clean entries before `g * stride + offset`.

        `stride=block, offset=0` (the default) is the training mask of block diffusion (BD3-LM, eq.
        9): each noisy block sees the clean blocks before it. `stride=1, offset=1` drafts behind
        every outcome of a verification (TiDAR, section 3): group g continues the first g + 1 clean
        entries. `repeat=2` lays two noisy versions of each block beside each other, as
        complementary masks do (Fast-dLLM v2).
        """
        return BlockMask(
            clean=clean,
            clean_block=clean_block,
            block=block,
            stride=block if stride is None else stride,
            offset=offset,
            repeat=repeat,
        )

    def clean_end(self, index: jax.Array) -> jax.Array:
        """First clean key that the query at `index` does not see."""
        own = jnp.minimum((index // self.clean_block + 1) * self.clean_block, self.clean)
        if not self.block:
            return own
        behind = self.group(index) // self.repeat * self.stride + self.offset
        behind = jnp.minimum(behind, self.clean)
        return jnp.where(index < self.clean, own, behind)

    def group(self, index: jax.Array) -> jax.Array:
        """Noisy group of an entry, -1 for a clean one."""
        if not self.block:
            return jnp.full_like(index, -1)
        return jnp.where(index < self.clean, -1, (index - self.clean) // self.block)

    def allow(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """Whether the query at index `query` sees the key at index `key`; the two broadcast."""
        same = (self.group(query) == self.group(key)) & (query >= self.clean) & (key >= self.clean)
        return ((key < self.clean) & (key < self.clean_end(query))) | same

    def dense(self, length: int) -> jax.Array:
        """The mask written out, bool[length, length]. For references and tests."""
        index = jnp.arange(length)
        return self.allow(index[:, None], index[None, :])
