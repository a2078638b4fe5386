"""Small tasks that tell methods apart: questions without end, and an exact check of each answer.

task = tasks.named("sudoku", size=9)
source = tasks.Examples(task, "train", 1_000_000)
for batch in data.batches(source, batch=64, length=task.length, pad_id=0, seed=0): ...
"""

from dllm_jax.tasks.sudoku import Sudoku
from dllm_jax.tasks.table import TASKS, named
from dllm_jax.tasks.task import Examples, Task, Vocabulary

__all__ = ["TASKS", "Examples", "Sudoku", "Task", "Vocabulary", "named"]
