"""Parameter trees as data: what every architecture says about its own, and what is read off it.

A config has `tree()`, a nested dict of `Entry`s, `build()`, its module, and `sizes()`, the letters
in which name maps spell its published tensors.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

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


def apart(params: Params) -> Params:
    """The same parameters, with stacks of dense layers as tuples of layers where that is faster.

    On CPUs a product takes no slice of an array: a loop that goes through a stack again and again
    copies each layer each time, which is more traffic than the products themselves have. Taken
    apart outside of the loop, a layer is copied once. Small ones are not worth their compilation.
    """
    if jax.default_backend() != "cpu":
        return params
    return {name: _split(name, sub) for name, sub in params.items()}


def is_apart(stack: Any) -> bool:
    """Whether a stack of layers is a tuple of them."""
    return isinstance(stack, tuple)


def _split(name: str, stack: Any):
    if name not in ("layers", "dense_layers") or is_apart(stack):
        return stack
    # Of the modules, `Transformer` alone takes its layers so; experts are read where they lie.
    if set(stack) != {"attention", "mlp"} or "router" in stack["mlp"]:
        return stack
    leaves = jax.tree.leaves(stack)
    count = leaves[0].shape[0]
    if sum(x.size * x.dtype.itemsize for x in leaves) < count << 20:
        return stack
    return tuple(jax.tree.map(lambda x, i=i: x[i], stack) for i in range(count))


def init(key: jax.Array, shapes: Params | jax.ShapeDtypeStruct):
    """Norms are ones, biases zeros, matrices normal with variance 1 / fan-in (embed: 0.02)."""
    if isinstance(shapes, jax.ShapeDtypeStruct):
        return _init_leaf(key, "", shapes)
    leaves, tree = jax.tree.flatten_with_path(shapes)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        tree, [_init_leaf(k, path[-1].key, s) for k, (path, s) in zip(keys, leaves, strict=True)]
    )


def _init_leaf(key, name, shape):
    if len(shape.shape) == 1 or "norm" in name:
        return jnp.ones(shape.shape, shape.dtype)
    if "bias" in name or name == "out":
        return jnp.zeros(shape.shape, shape.dtype)
    if not name:  # embed [V, D], head [D, V]
        return (0.02 * jax.random.normal(key, shape.shape)).astype(shape.dtype)
    fan_in = shape.shape[1] * (shape.shape[2] if name == "o" else 1)
    if name in ("gate", "up", "down"):  # [Ly, D, F], or [Ly, E, D, F] of experts
        fan_in = shape.shape[-2]
    return (jax.random.normal(key, shape.shape) / fan_in**0.5).astype(shape.dtype)
