"""Small tasks that tell methods apart: questions without end, and an exact check of each answer.

task = tasks.named("sudoku", size=9)
source = tasks.Examples(task, "train", 1_000_000)
for batch in data.batches(source, batch=64, length=task.length, pad_id=0, seed=0): ...
"""

from dllm_jax.tasks.accuracy import Answer, Solved, judged, solve
from dllm_jax.tasks.addition import Addition
from dllm_jax.tasks.brackets import Brackets
from dllm_jax.tasks.countdown import Countdown
from dllm_jax.tasks.path_star import PathStar
from dllm_jax.tasks.recall import Recall
from dllm_jax.tasks.repair import Repair
from dllm_jax.tasks.sudoku import Sudoku
from dllm_jax.tasks.table import TASKS, named
from dllm_jax.tasks.task import Examples, Task, Vocabulary

__all__ = [
    "TASKS",
    "Addition",
    "Answer",
    "Brackets",
    "Countdown",
    "Examples",
    "PathStar",
    "Recall",
    "Repair",
    "Solved",
    "Sudoku",
    "Task",
    "Vocabulary",
    "judged",
    "named",
    "solve",
]
