"""Attention for block diffusion, usable without `dllm_jax`: mask specs, and attention."""

from pallas_kernels.block_attention.api import block_attention
from pallas_kernels.masks import BlockMask

__all__ = ["BlockMask", "block_attention"]
