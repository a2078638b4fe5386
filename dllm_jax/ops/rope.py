"""Rotary position embedding (Su et al. 2021), half-rotation form: pairs are (i, i + R / 2).

A model that was trained on short texts reads longer ones with its frequencies scaled.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

SCALINGS = ("linear", "dynamic", "yarn", "llama3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for texts longer than `original_length`.

    * linear: every frequency over `factor` (Chen et al. 2023, arXiv 2306.15595).
    * dynamic (NTK): a larger base, so that slow planes stretch and fast ones hardly do. What
      transformers computes anew for the length of each call is here one base for all positions,
      that of `max_length` of the model: up to `original_length` nothing is scaled, as there. A
      longer text is read by a config whose `max_length` is larger.
    * yarn: slow planes over `factor`, fast ones as they are, a ramp between (Peng et al. 2023,
      arXiv 2309.00071), and queries and keys longer by `attention_factor`.
    * llama3: the same with a ramp over wave lengths (Llama 3.1).
    """

    kind: str  # one of `SCALINGS`
    factor: float
    original_length: int = 0  # positions the model was first trained on; linear needs none
    # llama3: waves longer than original_length / low_factor are slow, below / high_factor fast
    low_factor: float = 1.0
    high_factor: float = 4.0
    # yarn: planes that turn more than beta_fast times within original_length are fast, fewer than
    # beta_slow times slow
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # whether the ramp begins and ends at whole planes
    attention_factor: float | None = None  # None: 0.1 * ln(factor) + 1, or by the two below
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    def __post_init__(self):
        if self.kind not in SCALINGS:
            raise ValueError(f"RoPE scaling {self.kind!r} is none of {', '.join(SCALINGS)}")
        if not self.factor >= 1:
            raise ValueError(f"a RoPE scaling needs a factor of at least 1, got {self.factor}")
        if self.kind != "linear" and self.original_length < 1:
            raise ValueError(f"RoPE scaling {self.kind!r} needs the length of the first training")
        if self.kind == "llama3" and not self.high_factor > self.low_factor > 0:
            raise ValueError(
                f"high_factor={self.high_factor} must exceed low_factor={self.low_factor}"
            )

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied by: queries and keys grow by it."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        grown = lambda share: 0.1 * share * math.log(self.factor) + 1.0  # noqa: E731
        if self.mscale and self.mscale_all_dim:
            return grown(self.mscale) / grown(self.mscale_all_dim)
        return grown(1.0)


def rope_angles(
    positions: Int[Array, "B Q"],
    rotary_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    max_length: int = 0,
) -> tuple[Float[Array, "B Q R2"], Float[Array, "B Q R2"]]:
    """Cosines and sines of each position, float32: one pair for each of rotary_dim / 2 planes.

    Args:
      max_length: of the model, for a dynamic scaling.
    """
    if scaling is None:
        frequency = theta ** (-jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
    else:
        frequency = jnp.asarray(_scaled(rotary_dim, theta, scaling, max_length), jnp.float32)
    angle = positions[..., None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if scaling is None or scaling.magnitude == 1:
        return cos, sin
    return cos * scaling.magnitude, sin * scaling.magnitude


def rotate(
    x: Float[Array, "B Q N H"], cos: Float[Array, "B Q R2"], sin: Float[Array, "B Q R2"]
) -> Float[Array, "B Q N H"]:
    """Turns the planes of each head's first 2 * R2 dimensions; the others stay as they are."""
    turning, rest = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    left, right = jnp.split(turning.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)


def _scaled(dim: int, theta: float, scaling: RopeScaling, max_length: int) -> np.ndarray:
    """Radians a position of each plane, [dim / 2]."""
    factor, length = scaling.factor, scaling.original_length
    if scaling.kind == "dynamic":
        reach = factor * max(max_length, length) / length - (factor - 1)
        theta *= reach ** (dim / (dim - 2))
    frequency = theta ** (-np.arange(0, dim, 2) / dim)
    if scaling.kind == "dynamic":
        return frequency
    slow = np.ones(dim // 2)  # how much of `factor` a plane takes
    if scaling.kind == "llama3":
        waves = length * frequency / (2 * math.pi)  # that fit into the first training's length
        low, high = scaling.low_factor, scaling.high_factor
        slow = 1 - np.clip((waves - low) / (high - low), 0, 1)
    elif scaling.kind == "yarn":
        fast, last = (
            dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (scaling.beta_fast, scaling.beta_slow)
        )
        if scaling.truncate:
            fast, last = math.floor(fast), math.ceil(last)
        fast, last = max(fast, 0), min(last, dim - 1)
        width = last - fast if last != fast else 0.001
        slow = np.clip((np.arange(dim // 2) - fast) / width, 0, 1)
    return frequency * (slow / factor + 1 - slow)
