"""Noise: which tokens of a text a model must restore, and what it sees of them.

`MaskNoise`, `UniformNoise` and `MixedNoise` are processes over a whole text: objectives and bounds
are made of them. `MaskedBlocks` is for the dual stream: blocks at random places of an answer.
"""

from dllm_jax.corruption.blocks import MaskedBlocks, NoisyBlocks
from dllm_jax.corruption.masks import MaskNoise
from dllm_jax.corruption.mixed import MixedNoise
from dllm_jax.corruption.schedules import Cosine, Linear, Polynomial, Schedule
from dllm_jax.corruption.text import NoisyText
from dllm_jax.corruption.uniform import UniformNoise

Noise = MaskNoise | MixedNoise | UniformNoise
"""The processes over a whole text."""

__all__ = [
    "Cosine",
    "Linear",
    "MaskNoise",
    "MaskedBlocks",
    "MixedNoise",
    "Noise",
    "NoisyBlocks",
    "NoisyText",
    "Polynomial",
    "Schedule",
    "UniformNoise",
]
