"""The training step and the loop around it.

`step.py` is the step, `optimisers.py` what moves the parameters, `loop.py` a run on one process or
many, `phases.py` a run in parts, `checkpoints.py` what it saves and restores, `records.py`,
`reports.py` and `curves.py` what it writes for people.
"""

from dllm_jax.training.checkpoints import average, restore
from dllm_jax.training.curves import Curves, plot
from dllm_jax.training.loop import Evaluation, Fit, OnSpike, evaluate, fit
from dllm_jax.training.optimisers import Optimiser
from dllm_jax.training.phases import Phase, check_phases, fit_phases
from dllm_jax.training.records import read_metrics
from dllm_jax.training.spikes import Spike, read_spike
from dllm_jax.training.step import TrainState, create, make_train_step, trained
from dllm_jax.training.throughput import TIMES, step_flops

__all__ = [
    "TIMES",
    "Curves",
    "Evaluation",
    "Fit",
    "OnSpike",
    "Optimiser",
    "Phase",
    "Spike",
    "TrainState",
    "average",
    "check_phases",
    "create",
    "evaluate",
    "fit",
    "fit_phases",
    "make_train_step",
    "plot",
    "read_metrics",
    "read_spike",
    "restore",
    "step_flops",
    "trained",
]
