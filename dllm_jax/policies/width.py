"""How much is denoised at once, and how that moves over the text."""

from typing import ClassVar

from dllm_jax.policies.commit import part, static
from dllm_jax.typing import Number


@part
class Blocks:
    """One block of `size` after the other; 0: the whole canvas is one block.

    With `sub`, only the leftmost `sub` positions that are not done may be written (Fast-dLLM v2).
    """

    size: int = static(default=32)
    sub: int = static(default=0)

    def __post_init__(self):
        _positive(self.size, 0)
        if self.sub and (self.size % self.sub or self.sub < 0):
            raise ValueError(f"sub={self.sub} must divide the block of {self.size}")


@part
class Sliding:
    """The `size` positions behind the written text, which move on as soon as it grows.

    For causal models with a mask token: the first position is written at every step, as the causal
    mode would.
    """

    size: int = static(default=4)
    sub: ClassVar[int] = 0

    def __post_init__(self):
        _positive(self.size, 1)


@part
class Pipeline:
    """Up to `blocks` blocks at once, later ones opened before earlier ones are done (D2F).

    A block is opened when the one before is filled to the share `add`. It writes only what is over
    the threshold until the one before is filled to the share `complete`; from then on at least one
    position a step.
    """

    size: int = static(default=32)
    blocks: int = static(default=4)
    add: Number = 0.1
    complete: Number = 0.95
    sub: ClassVar[int] = 0

    def __post_init__(self):
        _positive(self.size, 1)
        if self.blocks < 1:
            raise ValueError(f"blocks={self.blocks} must be at least 1")
        if isinstance(self.add, int | float) and self.add > 1:
            raise ValueError(f"add={self.add} is a share: no block is filled to more than 1")


def _positive(size, least: int) -> None:
    if isinstance(size, int) and size < least:
        raise ValueError(f"a block of {size} positions: give at least {least}")
