"""Where arrays live: logical axes, the rules that map them onto a mesh, and nothing else.

This is the only file that says `PartitionSpec`. Models name their axes ("embed", "heads"); a
`Rules` says which axis of the mesh each of them is split over:

    mesh = make_mesh(data=2, tensor=4)
    placed = shardings(param_axes(config), mesh, TENSOR, shapes=param_shapes(config))
    params = jax.device_put(params, placed)
"""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

Axis = str | tuple[str, ...] | None
"""Where a logical axis goes: one mesh axis, several (split over all of them), or none (whole)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """The mesh axis of each logical axis; None keeps it whole on every device."""

    batch: Axis = None
    vocab: Axis = None
    embed: Axis = None
    heads: Axis = None
    kv_heads: Axis = None
    head_dim: Axis = None
    ffn: Axis = None
    expert: Axis = None
    layers: Axis = None


FSDP = Rules(batch=("data", "fsdp"), embed="fsdp")
"""Parameters split over `fsdp` and gathered layer by layer; the batch over every device."""

TENSOR = Rules(batch="data", vocab="tensor", heads="tensor", kv_heads="tensor", ffn="tensor")
"""Heads, feed-forward and vocabulary split over `tensor`; an all-reduce per attention and MLP."""

FSDP_TENSOR = dataclasses.replace(TENSOR, batch=("data", "fsdp"), embed="fsdp")
"""Both. On a mesh whose `fsdp` or `tensor` axis has size 1 that half does nothing."""


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh with the axes data, fsdp and tensor; an axis of -1 takes the devices that are left.

    The axes are Auto: the compiler places what is not constrained, so model code carries no specs.

    Raises:
      ValueError: two axes are -1, or the sizes do not fit the number of devices.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    devices = jax.device_count()
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh sizes are positive, with -1 (the rest) at most once; got {sizes}")
    if fixed > devices or (free and devices % fixed):
        raise ValueError(
            f"a mesh of {sizes} does not fit {devices} devices: {fixed} must divide it"
        )
    if free:
        sizes[free[0]] = devices // fixed
    used = jax.devices()[: math.prod(sizes.values())]
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=used)


def shardings(
    axes: Any, mesh: Mesh | AbstractMesh, rules: Rules = FSDP_TENSOR, *, shapes: Any = None
) -> Any:
    """The tree of `NamedSharding`s for a tree of logical axes.

    Args:
      axes: a tree whose leaves are tuples of logical axis names (or None), one per dimension.
      shapes: the same tree of things with a `shape`. With it, a dimension that its mesh axes do not
        divide is replicated; without it, every rule is applied as it stands.

    Within one array a mesh axis is used once: the first dimension that asks for it has it.

    Raises:
      ValueError: the rules name an axis that the mesh lacks, or `axes` a name that the rules lack.
    """
    for field in dataclasses.fields(rules):
        for axis in _names(getattr(rules, field.name)):
            if axis not in mesh.shape:
                raise ValueError(
                    f"the rules put {field.name!r} on mesh axis {axis!r}, but the mesh has only"
                    f" {tuple(mesh.shape)}; build it with make_mesh, or give other rules"
                )

    def one(names: tuple[str | None, ...], shape: tuple[int, ...] | None) -> NamedSharding:
        taken: set[str] = set()
        spec = []
        for dimension, name in enumerate(names):
            wanted = _names(_rule(rules, name))
            split = math.prod(mesh.shape[axis] for axis in wanted)
            if taken.intersection(wanted) or (shape is not None and shape[dimension] % split):
                wanted = ()
            taken.update(wanted)
            spec.append(wanted[0] if len(wanted) == 1 else (wanted or None))
        return NamedSharding(mesh, PartitionSpec(*spec))

    def is_leaf(node: Any) -> bool:
        return isinstance(node, tuple)

    if shapes is None:
        return jax.tree.map(lambda names: one(names, None), axes, is_leaf=is_leaf)
    return jax.tree.map(lambda names, leaf: one(names, leaf.shape), axes, shapes, is_leaf=is_leaf)


def _rule(rules: Rules, name: str | None) -> Axis:
    if name is None:
        return None
    if not hasattr(rules, name):
        known = [field.name for field in dataclasses.fields(rules)]
        raise ValueError(f"logical axis {name!r} has no rule; the axes are {known}")
    return getattr(rules, name)


def _names(axis: Axis) -> tuple[str, ...]:
    if axis is None:
        return ()
    return (axis,) if isinstance(axis, str) else axis
