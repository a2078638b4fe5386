"""Countdown with four numbers at 7M parameters, and with four and three at 0.2M, in four modes.

    dllm-jax train configs/countdown.py          # masked diffusion; also :block, :tri, :ar
    dllm-jax train configs/countdown.py:small    # also :small_block, :small_tri, :small_ar
    dllm-jax train configs/countdown.py:three    # also :three_block, :three_tri, :three_ar

The first are for an accelerator: 1e17 FLOPs are a month on two cores, and minutes on a chip. The
others take ten minutes a run on one core.
"""

from pathlib import Path

from dllm_jax.experiments import modes
from dllm_jax.tasks import Countdown

config, block, tri, ar = modes(
    Countdown(numbers=4), run=Path("runs/countdown-4"), layers=8, dim=256, heads=8, batch=256,
    flops=1e17,
)  # fmt: skip
small, small_block, small_tri, small_ar = modes(
    Countdown(numbers=4), run=Path("runs/countdown-4-small"), flops=2e13
)
three, three_block, three_tri, three_ar = modes(
    Countdown(numbers=3), run=Path("runs/countdown-3"), flops=2e13
)
