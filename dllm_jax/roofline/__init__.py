"""What a pass costs in closed form: chips as data, and bytes, FLOPs and time of a configuration."""

from dllm_jax.roofline.chips import CHIPS, Chip

__all__ = ["CHIPS", "Chip"]
