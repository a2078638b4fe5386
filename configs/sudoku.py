"""Sudoku of 9x9 in four modes: the same backbone, parameters and training FLOPs.

    dllm-jax train configs/sudoku.py                   # masked diffusion, in any order: 5 minutes
    dllm-jax train configs/sudoku.py:ar                # autoregressive; also :block, :tri
    dllm-jax train configs/sudoku.py:small             # 6x6; also :small_ar and so on
    dllm-jax train configs/sudoku.py:tiny              # 4x4, a minute; also :tiny_ar and so on

Seeds: --seed 1 --run runs/sudoku-9-seed1/masked.
"""

from pathlib import Path

from dllm_jax.experiments import modes
from dllm_jax.tasks import Sudoku

config, block, tri, ar = modes(
    Sudoku(layout="prompt"), canvas=Sudoku(), run=Path("runs/sudoku-9"), block=9, grid=True,
    batch=8, flops=1e13,
)  # fmt: skip
small, small_block, small_tri, small_ar = modes(
    Sudoku(size=6, layout="prompt"), canvas=Sudoku(size=6), run=Path("runs/sudoku-6"), block=6,
    grid=True, flops=4e12,
)  # fmt: skip
tiny, tiny_block, tiny_tri, tiny_ar = modes(
    Sudoku(size=4, layout="prompt", pool=256), canvas=Sudoku(size=4, pool=256),
    run=Path("runs/sudoku-4"), block=4, grid=True, flops=8e11,
)  # fmt: skip
