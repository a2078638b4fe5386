"""Parts of a recipe: what to commit at a step."""

from dllm_jax.policies.commit import CommitView, ConfidenceThreshold, EntropyBound, Quota

__all__ = ["CommitView", "ConfidenceThreshold", "EntropyBound", "Quota"]
