"""The clipped schedule with the least variance (BD3-LM)."""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dllm_jax.corruption import MaskNoise
from dllm_jax.losses.diffusion import Diffusion
from dllm_jax.typing import Key, Params

INTERVALS = tuple(
    (round(start / 20, 2), round((start + width) / 20, 2))
    for width in range(10, 21, 2)
    for start in range(0, 21 - width, 2)
)
"""Shares of masks [beta, omega], from half of [0, 1] to all of it."""


def least_variance(
    model: Any,
    params: Params,
    batches: Iterable[dict[str, Any]],
    *,
    objective: Diffusion,
    key: Key,
    intervals: Sequence[tuple[float, float]] = INTERVALS,
) -> tuple[Diffusion, dict[tuple[float, float], float]]:
    """The objective with the interval of noise whose loss varies least, and all their variances.

    What a step's gradient suffers from is the variance of its loss, and the best interval differs
    by block size (Arriola et al. 2025, 2503.09573, section 5.3): look for it now and then, and go
    on with what is found. A run does at the beginning of a phase with `Phase.tune`.

    Args:
      batches: as many as the variance is to be told from; every interval is tried on all of them.
      objective: of masks, `counts="independent"`.
      intervals: those to try; of them, where complements of the bound are learnt, those about 1/2.

    Raises:
      ValueError: the noise has no interval, or none is left, or there are fewer than two batches.
    """
    noise = check_interval(objective)
    if objective.complementary and noise.weighting == "bound":  # they are samples there alone
        intervals = [(low, high) for low, high in intervals if round(low + high, 6) == 1]
    if not intervals:
        raise ValueError("there is no interval to try")
    ends = jnp.array(intervals, jnp.float32)  # numbers of one program
    losses = [
        [float(_loss(objective, model, params, batch, jax.random.fold_in(key, i), x)) for x in ends]
        for i, batch in enumerate(batches)
    ]
    if len(losses) < 2:
        raise ValueError(f"{len(losses)} batches have no variance: give at least two")
    spread = np.var(losses, axis=0, ddof=1)
    variances = {interval: float(x) for interval, x in zip(intervals, spread, strict=True)}
    low, high = intervals[int(spread.argmin())]
    best = dataclasses.replace(noise, beta=low, omega=high)
    return dataclasses.replace(objective, noise=best), variances


def check_interval(objective: Any) -> MaskNoise:
    """Its noise; ValueError where that has no interval."""
    noise = getattr(objective, "noise", None)
    if not isinstance(noise, MaskNoise) or noise.counts != "independent":
        raise ValueError(f'an interval is of MaskNoise(counts="independent"), not of {noise}')
    return noise


@partial(jax.jit, static_argnums=(0, 1))
def _loss(objective: Diffusion, model: Any, params: Params, batch, key: Key, ends) -> jax.Array:
    assert isinstance(objective.noise, MaskNoise)
    noise = dataclasses.replace(objective.noise, beta=ends[0], omega=ends[1])
    own = dataclasses.replace(objective, noise=noise)
    return own.loss(model, params, batch, key)[1]["diffusion"]
