"""Where parameters go, and how they get there: a piece at a time, never a shard on the host."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dllm_jax.nn.tree import param_axes, param_shapes
from dllm_jax.sharding import EVERY, Rules, shardings
from dllm_jax.typing import Params

PIECE = 1 << 27
"""Bytes that are read at once."""

Index = tuple[slice, ...]
"""A part of an array: a start and a stop for each axis."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where parameters go: a mesh by rules, the default device, or (host) NumPy arrays."""

    mesh: Mesh | None = None
    rules: Rules | None = None
    host: bool = False

    def shardings(self, config: Any) -> Params:
        """The parameter tree of shardings."""
        mesh = jax.sharding.get_mesh() if self.mesh is None else self.mesh
        shapes = param_shapes(config)
        if mesh.empty:
            single = jnp.zeros(()).sharding
            return jax.tree.map(lambda _: single, shapes)
        return shardings(param_axes(config), mesh, self.rules or EVERY, shapes=shapes)

    def targets(self, config: Any, dtypes: Any) -> Any:
        """The tree of what Orbax is to restore."""
        shapes = param_shapes(config)
        if self.host:
            return jax.tree.map(lambda s, dtype: np.empty(s.shape, dtype), shapes, dtypes)
        return jax.tree.map(
            lambda s, dtype, where: jax.ShapeDtypeStruct(s.shape, dtype, sharding=where),
            shapes,
            dtypes,
            self.shardings(config),
        )


def on_devices(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """A host array on its devices; each process gives the shards of its own."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def placed(
    shape: tuple[int, ...],
    dtype: str | np.dtype,
    sharding: jax.sharding.Sharding,
    read: Callable[[Index], np.ndarray],
    *,
    piece: int = PIECE,
) -> jax.Array:
    """The array of which `read` gives any part; each process reads what its own devices hold.

    Beside what the devices hold, there is one piece in memory, and its copy on the way.

    Args:
      read: the part at an index, in any dtype that casts to `dtype`.
      piece: bytes to read at once; at least one element is.
    """
    dtype = np.dtype(dtype)
    homes: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True))
        homes.setdefault(bounds, []).append(device)
    found: dict[jax.Device, jax.Array] = {}
    # The same piece of every shard before the next one: they lie close together in the file.
    for parts in zip(*(_pieces(bounds, dtype.itemsize, piece) for bounds in homes), strict=True):
        for bounds, part, devices in zip(homes, parts, homes.values(), strict=True):
            block = read(tuple(slice(*ends) for ends in part))
            block = np.ascontiguousarray(block, dtype).reshape(block.shape)
            starts = tuple(
                start - first for (start, _), (first, _) in zip(part, bounds, strict=True)
            )
            for device in devices:
                own = jax.device_put(block, device)
                if part != bounds:
                    whole = tuple(stop - start for start, stop in bounds)
                    into = found.get(device)
                    into = jnp.zeros(whole, dtype, device=device) if into is None else into
                    own = _write(into, own, starts)
                found[device] = own.block_until_ready()  # before the next piece is read
    return jax.make_array_from_single_device_arrays(shape, sharding, list(found.values()))


@partial(jax.jit, donate_argnums=0)
def _write(into, block, starts):
    return jax.lax.dynamic_update_slice(into, block, starts)


def _pieces(
    bounds: tuple[tuple[int, int], ...], item: int, limit: int
) -> Iterator[tuple[tuple[int, int], ...]]:
    """Parts of at most `limit` bytes, cut along the first axes, in order."""
    size = item * math.prod(stop - start for start, stop in bounds)
    axis = next((i for i, (start, stop) in enumerate(bounds) if stop - start > 1), None)
    if size <= limit or axis is None:
        yield bounds
        return
    first, last = bounds[axis]
    step = max(1, limit // (size // (last - first)))
    for start in range(first, last, step):
        part = (*bounds[:axis], (start, min(start + step, last)), *bounds[axis + 1 :])
        yield from _pieces(part, item, limit)
