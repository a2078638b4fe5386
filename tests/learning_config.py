"""Small instances of tasks, and prose, each learnt within minutes: 0.1M to 0.25M parameters.

    dllm-jax train tests/learning_config.py:addition      # also _block, _tri, _ar

`tests/test_learning.py` says what they come to.
"""

import dataclasses
from pathlib import Path
from typing import Any

from dllm_jax import experiments
from dllm_jax.data import CorpusData
from dllm_jax.experiments import LOOKUP
from dllm_jax.tasks import Addition, Brackets, Countdown, PathStar, Recall, Repair, Sudoku, Task

LAST = dict(evaluate_every=1_000_000, save_every=1_000_000)  # asked after the last step alone


def modes(task: Task, *, flops: float, canvas: Task | None = None, **other: Any):
    """The modes of a task."""
    return experiments.modes(
        task, canvas=canvas, run=Path("runs/learning") / task.name, flops=flops, layers=2, **LAST,
        **other,
    )  # fmt: skip


addition, addition_block, addition_tri, addition_ar = modes(
    Addition(digits=2), canvas=Addition(digits=2, layout="canvas"), flops=4e11
)
brackets, brackets_block, brackets_tri, brackets_ar = modes(
    Brackets(kinds=2, longest=8, holes=1, hole=2), flops=4e11
)
countdown, countdown_block, countdown_tri, countdown_ar = modes(Countdown(numbers=2), flops=12e11)
repair, repair_block, repair_tri, repair_ar = modes(
    Repair(words=2), canvas=Repair(words=2, layout="canvas"), flops=12e11, **LOOKUP
)
path_star = modes(
    PathStar(degree=2, path=3, names=5),
    canvas=PathStar(degree=2, path=3, names=5, layout="canvas"), flops=12e11,
    **LOOKUP,
).masked  # fmt: skip
recall = modes(
    Recall(context=14, key=1, value=1),
    canvas=Recall(context=14, key=1, value=1, layout="canvas"), flops=12e11, **LOOKUP,
).masked  # fmt: skip
_sudoku = Sudoku(size=4, pool=256)
sudoku = modes(
    dataclasses.replace(_sudoku, layout="prompt"), canvas=_sudoku, flops=4e11, grid=True
).masked
text_ar, text_tri, text_block_4, text_block_16, text_masked = experiments.text_modes(
    CorpusData(folder=Path("runs/classics-characters"), length=256, kind="char", vocab_size=128),
    run=Path("runs/learning/text"), flops=2e12, layers=4, dim=64, heads=2, batch=4, **LAST,
)  # fmt: skip
text_bpe_ar, _, _, _, text_bpe_masked = experiments.text_modes(
    CorpusData(folder=Path("runs/classics-bpe"), length=256, vocab_size=4096),
    run=Path("runs/learning/text-bpe"), flops=4e12, layers=4, dim=64, heads=2, batch=4, **LAST,
)  # fmt: skip
