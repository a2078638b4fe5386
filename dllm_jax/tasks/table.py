"""The tasks by name."""

import dataclasses
from typing import Any

from dllm_jax.tasks.addition import Addition
from dllm_jax.tasks.brackets import Brackets
from dllm_jax.tasks.countdown import Countdown
from dllm_jax.tasks.path_star import PathStar
from dllm_jax.tasks.recall import Recall
from dllm_jax.tasks.repair import Repair
from dllm_jax.tasks.sudoku import Sudoku
from dllm_jax.tasks.task import Task

_KINDS = (Sudoku, Countdown, PathStar, Addition, Brackets, Repair, Recall)

TASKS: dict[str, type] = {kind.name: kind for kind in _KINDS}


def named(name: str, **fields: Any) -> Task:
    """A task by its name, with fields of its own.

    Raises:
      ValueError: no such task, it has no such field, or a field has a value that it cannot have.
    """
    if name not in TASKS:
        raise ValueError(f"no task {name!r}; there are {', '.join(TASKS)}")
    known = [field.name for field in dataclasses.fields(TASKS[name])]
    for field in fields:
        if field not in known:
            raise ValueError(f"task {name} has no field {field!r}; it has {', '.join(known)}")
    return TASKS[name](**fields)
