"""What makes block diffusion cheap, usable without `dllm_jax`.

Mask specs and block attention; vocabulary attention and the cross-entropy over it.
"""

from pallas_kernels.block_attention.api import block_attention
from pallas_kernels.masks import BlockMask
from pallas_kernels.token_stats.api import TokenStats, scores_at, token_stats
from pallas_kernels.token_stats.cross_entropy import cross_entropy

__all__ = [
    "BlockMask",
    "TokenStats",
    "block_attention",
    "cross_entropy",
    "scores_at",
    "token_stats",
]
