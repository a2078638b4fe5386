"""Which parts draw at random, and so need a key."""

import dataclasses
from typing import Any

import jax

from dllm_jax.policies.commit import Ancestral, FirstHitting
from dllm_jax.policies.revise import ReMDM, ReNoise


def random_part(part: Any) -> Any | None:
    """The first part within a part (or a recipe) that draws, however cold the sampling is."""
    noise = getattr(part, "noise", 0.0)
    drawn = not isinstance(noise, jax.core.Tracer) and noise > 0
    if drawn or getattr(part, "rank", None) == "random":
        return part
    if isinstance(part, Ancestral | FirstHitting | ReMDM | ReNoise):
        return part
    if not dataclasses.is_dataclass(part):
        return None
    inner = (random_part(getattr(part, field.name)) for field in dataclasses.fields(part))
    return next((found for found in inner if found is not None), None)
