"""What training minimises: objectives, each static under jit, with its equation and its source.

    objective.loss(model, params, batch, key) -> (loss, figures)

`Autoregressive`; `Diffusion`, whose noise and whose model make it one of the published losses
(`least_variance` tunes a clipped schedule); `DualStream`, which trains drafting blocks anywhere in
an answer; `Distillation`, of a bidirectional teacher into a block-causal student.
"""

from dllm_jax.losses.causal import Autoregressive
from dllm_jax.losses.clipping import least_variance
from dllm_jax.losses.diffusion import Diffusion
from dllm_jax.losses.distillation import Distillation
from dllm_jax.losses.dual_stream import DualStream
from dllm_jax.losses.objective import Drawn, Objective

__all__ = [
    "Autoregressive",
    "Diffusion",
    "Distillation",
    "Drawn",
    "DualStream",
    "Objective",
    "least_variance",
]
