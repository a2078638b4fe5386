"""Texts under noise: what every process of noise over a text makes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

WEIGHTINGS = ("bound", "flat")


class NoisyText(NamedTuple):
    """Texts under noise for one sample of a bound, in G blocks of T entries, Q = G * T."""

    tokens: jax.Array  # int32[B, Q]: what the model sees
    times: jax.Array  # float32[B, Q]: noise level of the entry's block
    weights: jax.Array  # float32[B, Q]: of the entry's nats; 0 where nothing is to be restored


def flat(noisy, times, weights) -> NoisyText:
    """Blocks [B, G, T], with times [B, G], side by side."""
    times = jnp.broadcast_to(times[..., None], noisy.shape)
    side = lambda x: x.reshape(len(x), -1)  # noqa: E731
    return NoisyText(side(noisy), side(times), side(weights))
