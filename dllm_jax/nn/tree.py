"""Parameter trees as data: what every architecture says about its own, and what is read off it.

A config has `tree()`, a nested dict of `Entry`s, `build()`, its module, and `sizes()`, the letters
in which name maps spell its published tensors.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp

from dllm_jax.typing import Params


class Entry(NamedTuple):
    """One parameter: its shape, and the logical axis names that say how it is sharded."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: str | None = None  # of a parameter that is kept in one dtype, whatever the others are in


@runtime_checkable
class Config(Protocol):
    """What is asked of an architecture's config here."""

    @property
    def param_dtype(self) -> str: ...

    def tree(self) -> Params: ...

    def sizes(self) -> dict[str, int]: ...

    def build(self) -> nn.Module: ...


def param_shapes(config: Config) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(
        lambda entry: jax.ShapeDtypeStruct(entry.shape, entry.dtype or config.param_dtype),
        config.tree(),
        is_leaf=lambda x: isinstance(x, Entry),
    )


def param_axes(config: Config) -> Params:
    """The parameter tree as tuples of logical axis names, for `sharding.shardings`."""
    return jax.tree.map(
        lambda entry: entry.axes, config.tree(), is_leaf=lambda x: isinstance(x, Entry)
    )


def init(
    key: jax.Array,
    shapes: Params | jax.ShapeDtypeStruct,
    *,
    vectors: float = 0.02,
    writes: float = 1.0,
):
    """Norms are ones, biases zeros, matrices normal with variance 1 / fan-in.

    Args:
      key: a random key.
      shapes: of one parameter, or of a tree of them.
      vectors: standard deviation of a table of vectors: one of tokens, or of positions.
      writes: factor of the matrices that write into the residual stream: `o` and `down`.
    """
    if isinstance(shapes, jax.ShapeDtypeStruct):
        return _init_leaf(key, "", shapes, vectors, writes)
    leaves, tree = jax.tree.flatten_with_path(shapes)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        tree,
        [
            _init_leaf(k, path[-1].key, s, vectors, writes)
            for k, (path, s) in zip(keys, leaves, strict=True)
        ],
    )


def _init_leaf(key, name, shape, vectors, writes):
    if len(shape.shape) == 1 or "norm" in name:
        return jnp.ones(shape.shape, shape.dtype)
    if "bias" in name or name == "out":
        return jnp.zeros(shape.shape, shape.dtype)
    if not name:  # embed and head, [V, D], and positions, [L, D]
        return (vectors * jax.random.normal(key, shape.shape)).astype(shape.dtype)
    fan_in = shape.shape[1] * (shape.shape[2] if name == "o" else 1)
    if name in ("gate", "up", "down"):  # [Ly, D, F], or [Ly, E, D, F] of experts
        fan_in = shape.shape[-2]
    scale = writes if name == "o" or name.endswith("down") else 1.0
    return (scale * jax.random.normal(key, shape.shape) / fan_in**0.5).astype(shape.dtype)
