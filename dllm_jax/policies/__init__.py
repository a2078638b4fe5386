"""Parts of a recipe: what to commit, what to revise, when a block is done, how wide to go."""

from dllm_jax.policies.chance import random_part
from dllm_jax.policies.commit import (
    Ancestral,
    CommitView,
    ConfidenceThreshold,
    Distrust,
    EntropyBound,
    Factor,
    FirstHitting,
    Quota,
    TimeGrid,
)
from dllm_jax.policies.finish import AfterSteps, FinishView, NoEdits, StableAndConfident
from dllm_jax.policies.revise import ReMDM, ReNoise, Replace, ReviseView, Revision
from dllm_jax.policies.shaping import AnnealedTemperature, Forbid, Guidance, SelfConditioning
from dllm_jax.policies.width import Blocks, Pipeline, Sliding

__all__ = [
    "AfterSteps",
    "Ancestral",
    "AnnealedTemperature",
    "Blocks",
    "CommitView",
    "ConfidenceThreshold",
    "Distrust",
    "EntropyBound",
    "Factor",
    "FinishView",
    "FirstHitting",
    "Forbid",
    "Guidance",
    "NoEdits",
    "Pipeline",
    "Quota",
    "ReMDM",
    "ReNoise",
    "Replace",
    "ReviseView",
    "Revision",
    "SelfConditioning",
    "Sliding",
    "StableAndConfident",
    "TimeGrid",
    "random_part",
]
