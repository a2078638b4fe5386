"""Schedules of noise: which share of the tokens is noise at a time in [0, 1].

The bound of masked diffusion does not depend on the schedule, but the noise of its estimate does,
and an objective with other weights than the bound's.
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@runtime_checkable
class Schedule(Protocol):
    """A part: hashable, with the share as a function that JAX can differentiate."""

    def share(self, t: Float[Array, "*B"], /) -> Float[Array, "*B"]:
        """The share of noise at a time: 0 at 0, 1 at 1, rising between."""
        ...


@dataclasses.dataclass(frozen=True)
class Linear:
    """share = t (LLaDA, MDLM's log-linear schedule)."""

    def share(self, t: Float[Array, "*B"]) -> Float[Array, "*B"]:
        return t


@dataclasses.dataclass(frozen=True)
class Cosine:
    """share = cos(pi / 2 (1 - t)): MD4 (Shi et al. 2024, 2406.04329, table 4)."""

    def share(self, t: Float[Array, "*B"]) -> Float[Array, "*B"]:
        return jnp.cos(math.pi / 2 * (1 - t))


@dataclasses.dataclass(frozen=True)
class Polynomial:
    """share = t ** power (MD4, table 4); 2 and 1/2 are BD3-LM's square and square root."""

    power: float = 2.0

    def __post_init__(self):
        if self.power <= 0:
            raise ValueError(f"power={self.power} must be positive")

    def share(self, t: Float[Array, "*B"]) -> Float[Array, "*B"]:
        return t**self.power


def rate(schedule: Schedule, t: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """How fast the share of noise grows at a time, in shares a unit of time."""
    return jax.jvp(schedule.share, (t,), (jnp.ones_like(t),))[1]
