"""What makes block diffusion cheap, usable without `dllm_jax`.

Mask specs and block attention; vocabulary attention and the cross-entropy over it.
"""

from pallas_kernels.block_attention.api import block_attention, block_attention_lse
from pallas_kernels.masks import BlockMask
from pallas_kernels.token_stats.api import Drawn, TokenStats, scores_at, token_stats
from pallas_kernels.token_stats.cross_entropy import CrossEntropy, cross_entropy

__all__ = [
    "BlockMask",
    "CrossEntropy",
    "Drawn",
    "TokenStats",
    "block_attention",
    "block_attention_lse",
    "cross_entropy",
    "scores_at",
    "token_stats",
]
