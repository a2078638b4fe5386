"""The training step and the loop around it: from an autoregressive model to block diffusion.

`step.py` is the step, `loop.py` a run on one process or many, `checkpoints.py` what it saves and
restores, `records.py` what it writes for people.
"""

from dllm_jax.training.checkpoints import restore
from dllm_jax.training.loop import Fit, evaluate, fit
from dllm_jax.training.records import plot, read_metrics
from dllm_jax.training.step import Optimiser, TrainState, create, make_train_step

__all__ = [
    "Fit",
    "Optimiser",
    "TrainState",
    "create",
    "evaluate",
    "fit",
    "make_train_step",
    "plot",
    "read_metrics",
    "restore",
]
