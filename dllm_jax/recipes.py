"""Named ways to decode, as data: pytrees whose numbers are traced and whose widths are static."""

import dataclasses
from typing import Any

import jax
import numpy as np

from dllm_jax.ops.sampling import Sampling
from dllm_jax.policies.commit import ConfidenceThreshold


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Verified:
    """Tokens of the causal mode, exactly; `width` > 0 drafts them by diffusion and verifies.

    Each forward pass holds the last token, `width` drafts, and `width` masks behind every outcome
    of their verification, (width + 1) ** 2 entries in all, so drafting and checking share one pass.
    """

    width: int = dataclasses.field(default=0, metadata={"static": True})
    sampling: Sampling = Sampling()

    def __post_init__(self):
        if isinstance(self.width, int) and self.width < 0:
            raise ValueError(f"width={self.width} must be 0 (no drafts) or positive")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockDiffusion:
    """Denoises the `block_size` positions behind the written text, over an exact prefix cache.

    Each pass writes the first of them, as the causal mode would, and those behind it that `commit`
    picks; whatever is gapless goes into the cache in the next pass, and the canvas slides on.
    """

    block_size: int = dataclasses.field(default=4, metadata={"static": True})
    commit: Any = ConfidenceThreshold()  # anything with `commit(view) -> bool[B, T]`
    sampling: Sampling = Sampling()

    def __post_init__(self):
        if isinstance(self.block_size, int) and self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} must be at least 1")


Recipe = Verified | BlockDiffusion


def ar(*, temperature=0.0, top_k=0, top_p=1.0) -> Verified:
    """Autoregressive: one token a forward pass."""
    return Verified(sampling=_sampling(temperature, top_k, top_p))


def self_speculative(*, width: int = 2, temperature=0.0, top_k=0, top_p=1.0) -> Verified:
    """The tokens of `ar`, several a pass: drafted by diffusion, checked causally.

    Greedy: the same tokens as `ar`. With a temperature: the same distribution, by acceptance and
    residual resampling (Leviathan et al. 2023; drafts behind every outcome: TiDAR, 2511.08923).
    """
    if width < 1:
        raise ValueError(f"width={width} must be at least 1; recipes.ar() drafts nothing")
    return Verified(width=width, sampling=_sampling(temperature, top_k, top_p))


def block_diffusion(
    *, block_size: int = 4, threshold=0.9, temperature=0.0, top_k=0, top_p=1.0
) -> BlockDiffusion:
    """Block diffusion with a confidence threshold and an exact prefix cache."""
    return BlockDiffusion(
        block_size=block_size,
        commit=ConfidenceThreshold(_real(threshold)),
        sampling=_sampling(temperature, top_k, top_p),
    )


def _sampling(temperature, top_k, top_p) -> Sampling:
    if isinstance(top_k, float | np.floating) and top_k != int(top_k):
        raise ValueError(f"top_k={top_k} must be a whole number")
    whole = top_k if isinstance(top_k, jax.Array) else int(top_k)
    return Sampling(_real(temperature), whole, _real(top_p))


def _real(number):
    """One type for every way to write a number, so that 1 and 1.0 share a compiled program."""
    return number if isinstance(number, jax.Array) else float(number)
