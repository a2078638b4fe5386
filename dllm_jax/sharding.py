"""Where arrays live: logical axes, the rules that map them onto a mesh, and nothing else.

This is the only file that says `PartitionSpec`. Models name their axes ("embed", "heads"); a
`Rules` says which axis of the mesh each of them is split over:

    mesh = make_mesh(data=2, tensor=4)
    placed = shardings(param_axes(config), mesh, TENSOR, shapes=param_shapes(config))
    params = jax.device_put(params, placed)

Parameters go by rules that the user chooses. Activations go by one table, `ACTIVATIONS`, and by the
mesh in scope (`jax.set_mesh`; `generate` and its like enter that of the parameters themselves).
Without a mesh, or on one of a single device, nothing here does anything.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "expert", "context", "tensor")
"""Of our meshes, the neighbours last: what talks most lies closest."""

Axis = str | tuple[str, ...] | None
"""Where a logical axis goes: one mesh axis, several (split over all of them), or none (whole)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """The mesh axis of each logical axis; None keeps it whole on every device."""

    batch: Axis = None
    length: Axis = None
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

EXPERT = Rules(batch=("data", "expert"), expert="expert")
"""Experts split over `expert`, and the batch too: tokens travel to them and back."""

CONTEXT = Rules(batch="data", length="context")
"""Long texts split over `context`: each device has a piece, and gathers a layer's keys for it."""

FSDP_TENSOR = dataclasses.replace(TENSOR, batch=("data", "fsdp"), embed="fsdp")
"""Both. On a mesh whose `fsdp` or `tensor` axis has size 1 that half does nothing."""

EVERY = dataclasses.replace(
    FSDP_TENSOR, batch=("data", "fsdp", "expert"), expert="expert", length="context"
)
"""All of them, each as far as the mesh has its axis: what `load(mesh=...)` takes by default."""

ACTIVATIONS = dataclasses.replace(EVERY, embed=None)
"""How arrays lie between the layers: hidden states are whole in their last axis."""

LEAST = 64
"""Entries of a row on a device: shorter pieces are not worth what travels, and stay whole."""


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    expert: int = 1,
    context: int = 1,
    *,
    explicit: bool = False,
) -> Mesh:
    """A mesh with the axes of `AXES`; an axis of -1 takes the devices that are left.

    The axes are Auto: the compiler places what is not constrained, so model code carries no specs.

    Args:
      explicit: axes are Explicit instead: shardings are part of an array's type, in your own code.
        Ours runs as on Auto axes, and returns arrays that are typed.

    Raises:
      ValueError: two axes are -1, or the sizes do not fit the number of devices.
    """
    sizes = dict(data=data, fsdp=fsdp, expert=expert, context=context, tensor=tensor)
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
    kinds = (AxisType.Explicit if explicit else AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=used)


def shardings(
    axes: Any, mesh: Mesh | AbstractMesh, rules: Rules = EVERY, *, shapes: Any = None
) -> Any:
    """The tree of `NamedSharding`s for a tree of logical axes.

    Args:
      axes: a tree whose leaves are tuples of logical axis names (or None), one per dimension.
      shapes: the same tree of things with a `shape`. With it, a dimension that its mesh axes do not
        divide is replicated; without it, every rule is applied as it stands.

    Within one array a mesh axis is used once: the first dimension that asks for it has it. One of
    `AXES` that a mesh of your own lacks is as one of size 1.

    Raises:
      ValueError: the rules name an axis that neither the mesh nor `AXES` has, or `axes` a name that
        the rules lack.
    """
    for field in dataclasses.fields(rules):
        for axis in _names(getattr(rules, field.name)):
            if axis not in mesh.shape and axis not in AXES:
                raise ValueError(
                    f"the rules put {field.name!r} on mesh axis {axis!r}, but the mesh has only"
                    f" {tuple(mesh.shape)}; build it with make_mesh, or give other rules"
                )

    def one(names: tuple[str | None, ...], shape: tuple[int, ...] | None) -> NamedSharding:
        taken: set[str] = set()
        spec = []
        for dimension, name in enumerate(names):
            wanted = tuple(axis for axis in _names(_rule(rules, name)) if axis in mesh.shape)
            split = math.prod(mesh.shape[axis] for axis in wanted)
            if taken.intersection(wanted) or (shape is not None and shape[dimension] % split):
                wanted = ()
            taken.update(wanted)
            spec.append(_one_or_more(wanted))
        return NamedSharding(mesh, PartitionSpec(*spec))

    def is_leaf(node: Any) -> bool:
        return isinstance(node, tuple)

    if shapes is None:
        return jax.tree.map(lambda names: one(names, None), axes, is_leaf=is_leaf)
    return jax.tree.map(lambda names, leaf: one(names, leaf.shape), axes, shapes, is_leaf=is_leaf)


# Activations, on the mesh in scope


def axis_sizes() -> dict[str, int]:
    """The axes of the mesh in scope over which the compiler may split, of more than one device.

    Axes that a surrounding `shard_map` has taken are not among them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return {axis: mesh.shape[axis] for axis in mesh.auto_axes if mesh.shape[axis] > 1}


def split(name: str | None, size: int) -> tuple[str, ...]:
    """The mesh axes over which a dimension of an activation is split, by the table and the mesh.

    As many of those that the table has for it as divide its size, the first ones first.
    """
    if not size or (name == "length" and size < LEAST * axis_sizes().get("context", 1)):
        return ()
    found: tuple[str, ...] = ()
    sizes, parts = axis_sizes(), 1
    for axis in _names(_rule(ACTIVATIONS, name)):
        parts *= sizes.get(axis, 1)
        if size % parts:
            break
        if axis in sizes:
            found = (*found, axis)
    return found


def spec(*axes: tuple[str, ...] | str | None) -> PartitionSpec:
    """The specification of an array from the mesh axes of each dimension (`split`)."""
    return PartitionSpec(*(_one_or_more(_names(axis)) for axis in axes))


def spec_of(shape: tuple[int, ...], *names: str | None) -> PartitionSpec:
    """The specification of an activation from the logical names of its dimensions.

    Dimensions that are not named, the last ones, are whole.
    """
    return spec(*(split(name, size) for name, size in zip(names, shape, strict=False)))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x`, laid out by the logical names of its dimensions; exactly `x` where there is no mesh."""
    if not axis_sizes():
        return x
    return _laid(x, spec_of(x.shape, *names))


def _laid(x: jax.Array, where: PartitionSpec) -> jax.Array:
    if isinstance(x, jax.core.Tracer):
        return jax.lax.with_sharding_constraint(x, where)
    return jax.device_put(x, where)


def mapped(run: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`run` on each device's part of its arguments (`jax.shard_map`), the whole mesh in scope.

    Gradients are right where they are taken from outside.
    """
    axes = set(jax.sharding.get_abstract_mesh().auto_axes)
    return jax.shard_map(
        run, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False
    )


Place = Callable[[str, tuple[int, ...]], PartitionSpec]
"""How an array of a tree lies, by where in it (`jax.tree_util.keystr`) and its shape."""


def automatic(run: Callable[..., Any], place: Place, *args: Any) -> Any:
    """`run(*args)` as on Auto axes where those of the mesh in scope are Explicit.

    Args:
      place: of what it returns: `placed` or the like.
      args: arrays, all that `run` takes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.explicit_axes or mesh.size == 1:
        return run(*args)
    leaves, tree = jax.tree.flatten(args)  # a class may refuse specifications in its fields
    paths: list[str] = []
    outer: Any = None

    def flat(leaves: list[jax.Array]) -> list[jax.Array]:
        nonlocal paths, outer
        found, outer = jax.tree.flatten_with_path(run(*jax.tree.unflatten(tree, leaves)))
        paths = [jax.tree_util.keystr(path) for path, _ in found]
        return [leaf for _, leaf in found]

    def on_auto(out_sharding: Any) -> Callable[..., Any]:
        return jax.jit(jax.sharding.auto_axes(flat, out_sharding=out_sharding))

    shapes = jax.eval_shape(on_auto(spec()), leaves)
    kinds = dict.fromkeys(mesh.explicit_axes, AxisType.Auto)
    with jax.sharding.use_abstract_mesh(mesh.update_axis_types(kinds)):
        specs = [place(path, x.shape) for path, x in zip(paths, shapes, strict=True)]
    return jax.tree.unflatten(outer, on_auto(specs)(leaves))


def placed(*names: str | None) -> Place:
    """Arrays whose dimensions have these logical names, wherever they are."""
    return lambda path, shape: spec_of(shape, *names)


def as_they_lie(tree: Any) -> Place:
    """Arrays as those at the same places in `tree`, whose types say it; others are whole."""
    found = {
        jax.tree_util.keystr(path): jax.typeof(x).sharding.spec
        for path, x in jax.tree.leaves_with_path(tree)
    }
    return lambda path, shape: found.get(path, spec())


def laid_out(tree: Any, place: Place) -> Any:
    """A tree of arrays, as it lies on the mesh in scope, if there is one."""
    if not axis_sizes():
        return tree

    def one(path: Any, x: jax.Array) -> jax.Array:
        return _laid(x, place(jax.tree_util.keystr(path), x.shape))

    return jax.tree.map_with_path(one, tree)


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh of several devices on which a tree of arrays lies; None: there is none."""
    for x in jax.tree.leaves(tree):
        where = None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
        if isinstance(where, NamedSharding) and where.mesh.size > 1:
            return where.mesh if isinstance(where.mesh, Mesh) else None
    return None


def scope(params: Any) -> contextlib.AbstractContextManager[Any]:
    """The mesh of the parameters in scope, where they lie on one and none is in scope.

    Within a program that is being traced, nothing: there the mesh is that of its caller.
    """
    if not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    mesh = mesh_of(params)
    if mesh is None or isinstance(jnp.zeros(()), jax.core.Tracer):
        return contextlib.nullcontext()
    return jax.set_mesh(mesh)


def in_scope(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of (model, params, ...) that runs on the mesh on which `params` lie (`scope`)."""

    @functools.wraps(function)
    def run(model: Any, params: Any, *args: Any, **options: Any) -> Any:
        with scope(params):
            return function(model, params, *args, **options)

    return run


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


def _one_or_more(axes: tuple[str, ...]) -> Axis:
    return axes[0] if len(axes) == 1 else (axes or None)
