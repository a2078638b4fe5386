"""What a recipe is: a row of parts for one of the two loops."""

import dataclasses
from typing import Any

import jax

from dllm_jax.ops.sampling import Sampling
from dllm_jax.policies import (
    Blocks,
    ConfidenceThreshold,
    Guidance,
    Pipeline,
    SelfConditioning,
    Sliding,
)


def _static(default):
    return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Verified:
    """Tokens of the causal mode, exactly; `width` > 0 drafts them by diffusion and verifies.

    Each forward pass holds the last token, `width` drafts, and `width` masks behind every outcome
    of their verification, (width + 1) ** 2 entries in all, so drafting and checking share one pass.
    """

    width: int = _static(0)
    sampling: Sampling = Sampling()

    def __post_init__(self):
        if isinstance(self.width, int) and self.width < 0:
            raise ValueError(f"width={self.width} must be 0 (no drafts) or positive")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoise:
    """A row of parts plugged into the denoising loop. None switches a part off.

    Caches: "none" runs every pass over the whole canvas; "prefix" keeps what is before the block
    from the pass that opened it, "dual" what is before and behind (both approximate, for
    bidirectional models); "exact" keeps finished blocks, which never change (block-causal and
    causal models); "exact_sub_block" keeps the other sub-blocks of the block too, approximately.
    """

    width: Blocks | Sliding | Pipeline = Blocks(32)
    cache: str = _static("none")
    commit: Any = ConfidenceThreshold()  # `commit(view) -> bool[B, T]`
    revise: Any = None  # `revise(view) -> Revision`
    finish: Any = None  # `done(view) -> bool[B]`
    carry: SelfConditioning | None = None
    guidance: Guidance | None = None
    shape: Any = None  # `shape(logits, step) -> logits`
    sampling: Sampling = Sampling()
    # Whose probabilities policies see: "model", its own | "sampled", those that tokens are drawn
    # from, after temperature, top-k and top-p
    confidence: str = _static("model")
    # Blocks end at multiples of their size from position 0, so the prompt's tail is part of the
    # first; else they begin right behind the prompt.
    aligned: bool = _static(False)
    # Where the first token of a block comes from: None, as the others | "opening": it is all that
    # the pass that opens the block writes | "commit": the pass that caches the block before
    first: str | None = _static(None)
    # Each step writes a position; the most confident, where the policy picks none.
    progress: bool = _static(True)
    max_steps: Any = None  # the last of so many steps of a block writes all that is left
    # "answer": a row stops when its text is gapless up to an end-of-turn token | "block": when the
    # block with one is done | "never"
    ending: str = _static("answer")
    predict_mask: bool = _static(False)  # the mask token may be written (published codes allow it)

    def __post_init__(self):
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {known}")


_CHOICES = {
    "cache": ("none", "prefix", "dual", "exact", "exact_sub_block"),
    "confidence": ("model", "sampled"),
    "first": (None, "opening", "commit"),
    "ending": ("answer", "block", "never"),
}

Recipe = Verified | Denoise
