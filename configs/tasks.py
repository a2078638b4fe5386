"""The other tasks, each in four modes: the same backbone, parameters and training FLOPs.

    dllm-jax train configs/tasks.py:path_star          # masked diffusion
    dllm-jax train configs/tasks.py:path_star_ar       # autoregressive; also _block, _tri

path_star (three paths of three nodes), path_star_5 (five of five), addition, brackets, repair,
recall (512 tokens), recall_4k. Sudoku, Countdown and text have files of their own.
"""

from pathlib import Path

from dllm_jax.experiments import LOOKUP, modes
from dllm_jax.tasks import Addition, Brackets, PathStar, Recall, Repair

path_star, path_star_block, path_star_tri, path_star_ar = modes(
    PathStar(degree=3, path=3, names=10),
    canvas=PathStar(degree=3, path=3, names=10, layout="canvas"),
    run=Path("runs/path-star"), flops=8e12, **LOOKUP,
)  # fmt: skip
path_star_5, path_star_5_block, path_star_5_tri, path_star_5_ar = modes(
    PathStar(), canvas=PathStar(layout="canvas"), run=Path("runs/path-star-5"), flops=2e13,
    **LOOKUP,
)  # fmt: skip
# A canvas fills numbers up with zeros, an easier task: masked learns the texts of the others.
addition, addition_block, addition_tri, addition_ar = modes(
    Addition(), run=Path("runs/addition"), flops=8e12
)
addition_canvas = modes(
    Addition(), canvas=Addition(layout="canvas"), run=Path("runs/addition-canvas"), flops=8e12
).masked
brackets, brackets_block, brackets_tri, brackets_ar = modes(
    Brackets(), run=Path("runs/brackets"), flops=8e12
)
repair, repair_block, repair_tri, repair_ar = modes(
    Repair(), canvas=Repair(layout="canvas"), run=Path("runs/repair"), flops=2e13, **LOOKUP
)
recall, recall_block, recall_tri, recall_ar = modes(
    Recall(), canvas=Recall(layout="canvas"), run=Path("runs/recall"), flops=2e13, batch=8, **LOOKUP
)
recall_4k, recall_4k_block, recall_4k_tri, recall_4k_ar = modes(
    Recall(context=4096), canvas=Recall(context=4096, layout="canvas"), run=Path("runs/recall-4k"),
    flops=2e14, batch=4, **LOOKUP,
)  # fmt: skip
