"""Optimisers: what is done with a gradient, and how fast.

The kinds share one learning rate: an update of AdamW moves an entry by about that much, and so do
those of the others (Lion asks for a third to a tenth of it, by its authors). Which parameters are
matrices is read off the model's logical axes: the arrays of stacked layers and experts are many.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from dllm_jax.nn.tree import Config, param_axes
from dllm_jax.typing import Params

Kind = Literal["adamw", "muon", "adafactor", "lion"]
Schedule = Literal["cosine", "linear", "constant", "wsd"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimiser:
    """An optimiser with warm-up and decay, gradients clipped by their global norm.

    adamw: Loshchilov & Hutter 2019, arXiv 1711.05101. muon: matrices by the orthogonalised momentum
    (Jordan 2024), scaled to the size of an update of AdamW (Liu et al. 2025, 2502.16982), all else
    by AdamW. adafactor: Shazeer & Stern 2018, 1804.04235, without the scale of the parameters.
    lion: Chen et al. 2023, 2302.06675.
    """

    kind: Kind = "adamw"
    """adamw, muon, adafactor (least memory), or lion."""
    learning_rate: float = 1e-3
    """At its highest."""
    schedule: Schedule = "cosine"
    """After the warm-up: cosine or linear (down to the last step), constant, or wsd: stable, then
    linearly down in the last steps."""
    warmup: int = 20
    """Steps until the learning rate is at its highest; that of the first is 0, as optax has it."""
    final: float = 0.05
    """What the learning rate has come to after the last step, as a share of the highest."""
    decay: float = 0.2
    """Share of all steps in which wsd goes down."""
    weight_decay: float = 0.0
    """Times the learning rate; of matrices alone."""
    decay_embeddings: bool = False
    """The embeddings and the head decay too."""
    b1: float = 0.9
    """Of the first moment."""
    b2: float = 0.99
    """Of the second moment; of lion, of its momentum."""
    eps: float = 1e-8
    """Added to the root of the second moment of AdamW."""
    momentum: float = 0.95
    """Of the matrices of muon."""
    clip: float = 1.0
    """Largest global norm of a gradient; 0: it is left as it is."""

    def __post_init__(self):
        for name, known in (("kind", Kind), ("schedule", Schedule)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(get_args(known))}"
                )
        if self.learning_rate <= 0 or self.warmup < 0 or self.weight_decay < 0 or self.clip < 0:
            raise ValueError(
                f"learning_rate={self.learning_rate} must be positive, warmup={self.warmup}, "
                f"weight_decay={self.weight_decay} and clip={self.clip} at least 0"
            )
        for name in ("final", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is a share: it must be in [0, 1]")
        for name in ("b1", "b2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")

    def build(self, steps: int, config: Config | None = None) -> optax.GradientTransformation:
        """The optax transformation for a run of `steps`.

        Args:
          config: of the model, which says what is a matrix: for muon, and for weight decay.

        Raises:
          ValueError: it is needed and not given.
        """
        if config is None and (self.kind == "muon" or self.weight_decay):
            what = "muon" if self.kind == "muon" else f"weight_decay={self.weight_decay}"
            raise ValueError(f"{what} needs to know the matrices: build(steps, model.config)")
        parts = [optax.stateless(functools.partial(_clipped, self.clip))] if self.clip else []
        parts += _direction(self, config)
        if self.weight_decay:
            mask = functools.partial(_decayed, config, self.decay_embeddings)
            parts.append(optax.add_decayed_weights(self.weight_decay, mask))
        return optax.chain(*parts, optax.scale_by_learning_rate(self.rate(steps)))

    def rate(self, steps: int) -> optax.Schedule:
        """The learning rate by step, 0 to `steps`."""
        most, warmup = self.learning_rate, max(min(self.warmup, steps - 1), 0)
        least, left = most * self.final, max(steps - warmup, 1)
        if self.schedule == "cosine":
            return optax.warmup_cosine_decay_schedule(0.0, most, warmup, steps, least)
        rising = optax.linear_schedule(0.0, most, warmup)
        if self.schedule == "constant":
            return optax.join_schedules([rising, optax.constant_schedule(most)], [warmup])
        falling = left if self.schedule == "linear" else min(round(self.decay * steps), left)
        down = optax.linear_schedule(most, least, max(falling, 1))
        stable = optax.constant_schedule(most)
        return optax.join_schedules([rising, stable, down], [warmup, steps - falling])


def global_norm(tree: Params) -> jax.Array:
    """The norm of all entries together, in float32 at least: sums of bfloat16 lose small terms."""
    return optax.tree.norm(jax.tree.map(_wide, tree))


def matrix_axes(axes: tuple[str | None, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Where a matrix has its inputs and outputs, from its logical axes; None: it is none.

    Layers and experts are many matrices, heads and their sizes one dimension. Tables, of the
    vocabulary and of positions, are no matrices here, nor are norms and biases.
    """
    groups: list[tuple[int, ...]] = []
    for place, axis in enumerate(axes):
        if axis in ("layers", "expert"):
            continue
        if axis == "head_dim" and place and axes[place - 1] in ("heads", "kv_heads"):
            groups[-1] = (*groups[-1], place)
        else:
            groups.append((place,))
    table = "vocab" in axes or (None in axes and "layers" not in axes)
    if len(groups) != 2 or table:
        return None
    return groups[0], groups[1]


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _clipped(most: float, updates: Params, params: Params | None = None) -> Params:
    """Updates with a global norm of at most so much, in their own dtypes."""
    norm = global_norm(updates)

    def one(x: jax.Array) -> jax.Array:
        return jnp.where(norm < most, x, (_wide(x) / norm * most).astype(x.dtype))

    return jax.tree.map(one, updates)


def _direction(o: Optimiser, config: Config | None) -> list[optax.GradientTransformation]:
    """What the learning rate is multiplied by."""
    adam = optax.scale_by_adam(o.b1, o.b2, o.eps)
    match o.kind:
        case "adamw":
            return [adam]
        case "lion":
            return [optax.scale_by_lion(o.b1, o.b2)]
        case "adafactor":
            return [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
    dimensions = functools.partial(_dimensions, config)
    muon = optax.chain(
        contrib.scale_by_muon(beta=o.momentum, weight_dimension_numbers=dimensions),
        optax.stateless(functools.partial(_sized, dimensions)),
    )
    return [optax.partition({"muon": muon, "adam": adam}, functools.partial(_labels, config))]


def _of_each(config: Any, params: Params, function: Callable[..., Any]) -> Params:
    """`function(axes, matrix)` of each parameter that is there: `matrix_axes`, of biases None."""
    axes = param_axes(config)

    def one(path: tuple[Any, ...], axes: tuple[str | None, ...]) -> Any:
        return function(axes, None if "bias" in path[-1].key else matrix_axes(axes))

    found = {name: axes[name] for name in params}
    return jax.tree.map_with_path(one, found, is_leaf=lambda node: isinstance(node, tuple))


def _labels(config: Any, params: Params) -> Params:
    return _of_each(config, params, lambda axes, matrix: "muon" if matrix else "adam")


def _dimensions(config: Any, params: Params) -> Params:
    """Which axes of the matrices muon multiplies; what is not its own stays out."""

    def one(axes: Any, matrix: Any) -> Any:
        return contrib.MuonDimensionNumbers(*matrix) if matrix else optax.MaskedNode()

    return _of_each(config, params, one)


def _sized(dimensions: Any, updates: Params, params: Params | None = None) -> Params:
    """Orthogonal updates at the root mean square of AdamW's: 0.2 (2502.16982, equation 4)."""

    def one(numbers: contrib.MuonDimensionNumbers, update: jax.Array) -> jax.Array:
        inputs, outputs = cast(tuple[tuple[int, ...], ...], tuple(numbers))
        size = lambda axes: math.prod(update.shape[axis] for axis in axes)  # noqa: E731
        return update * (0.2 * max(size(inputs), size(outputs)) ** 0.5)

    is_leaf = lambda node: isinstance(node, contrib.MuonDimensionNumbers)  # noqa: E731
    return jax.tree.map(one, dimensions(updates), updates, is_leaf=is_leaf)


def _decayed(config: Any, embeddings: bool, params: Params) -> Params:
    """Which parameters decay."""

    def one(axes: Any, matrix: Any) -> bool:
        return matrix is not None or (embeddings and "vocab" in axes)

    return _of_each(config, params, one)
