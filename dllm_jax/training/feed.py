"""How batches get onto a mesh: which rows this process reads, and where they go.

And what their length costs.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dllm_jax.data import Source
from dllm_jax.sharding import Rules, make_mesh, mesh_of, shardings
from dllm_jax.typing import Params


class Feed:
    """How batches get onto a mesh: which rows this process reads, and where they go.

    Without a mesh it reads all of them, and leaves them where they are.
    """

    rows: np.ndarray  # int[R]: of each batch, those that this process reads

    def __init__(
        self, batch: int, mesh: Mesh | None, rules: Rules, *, parts: int = 1, whole: bool = False
    ):
        """Splits batches by `rules`; where `whole` says so, one that does not divide stays whole.

        Raises:
          ValueError: the batch does not divide over the mesh, in so many parts.
        """
        self.batch, self.rows = batch, np.arange(batch)
        if batch % parts:
            raise ValueError(f"accumulate={parts} must divide batch={batch}")
        self._homes: dict[int, NamedSharding] | None = None
        if mesh is None:
            return
        axes: Any = {1: ("batch",), 2: ("batch", None)}  # by an array's number of dimensions
        homes = shardings(axes, mesh, rules)
        shards = batch // homes[1].shard_shape((batch,))[0] if _divides(homes[1], batch) else 0
        if not shards or batch // parts % shards:
            if not whole:
                raise ValueError(
                    f"batch={batch} in {parts} part{'s' * (parts > 1)} does not divide over the "
                    f"data axes of the mesh {dict(mesh.shape)}; choose a multiple"
                )
            homes = shardings({n: (None,) * n for n in axes}, mesh, rules)
        self._homes = homes
        own = homes[1].addressable_devices_indices_map((batch,)).values()
        self.rows = np.unique(np.concatenate([np.arange(batch)[index] for index in own]))

    def place(self, given: dict[str, np.ndarray]) -> dict[str, Any]:
        """The global arrays of a batch, of this process's rows."""
        if self._homes is None:
            return given
        homes = self._homes

        def one(local: np.ndarray) -> jax.Array:
            def shard(index: Any) -> np.ndarray:
                return local[np.searchsorted(self.rows, np.arange(self.batch)[index[0]])]

            shape = (self.batch, *local.shape[1:])
            return jax.make_array_from_callback(shape, homes[local.ndim], shard)

        return {name: one(local) for name, local in given.items()}


def what_is_cut(source: Source, length: int) -> str:
    """In words, the rows that `length` cuts and those with nothing to learn; "" of none.

    Of a source that tells its `sizes`, and `prompts` where it has some (`data.Source`); of others
    "" too, for no row is read for it. One that tells its `longest` row is not to be cut.

    Raises:
      ValueError: no row has anything to learn; or rows would be cut that are not to be.
    """
    if (longest := getattr(source, "longest", 0)) > length:
        raise ValueError(
            f"length={length} cuts rows of {source}, which have up to {longest} tokens"
        )
    sizes = getattr(source, "sizes", None)
    if sizes is None:
        return ""
    prompts = getattr(source, "prompts", np.zeros_like(sizes))
    rows, longer = len(sizes), int((sizes > length).sum())
    empty = int((prompts >= np.minimum(sizes, length)).sum())
    if empty == rows:
        raise ValueError(
            f"length={length} leaves nothing to learn: the prompt of each of {rows:,} rows fills it"
        )
    if not (longer or empty):
        return ""
    return (
        f"length={length} cuts {longer:,} of {rows:,} rows; nothing to learn is left in {empty:,}"
    )


def _divides(home: NamedSharding, batch: int) -> bool:
    try:
        home.shard_shape((batch,))
    except ValueError:
        return False
    return True


def training_mesh(params: Params) -> Mesh | None:
    """The mesh that parameters lie on; None: they are on one device."""
    mesh = mesh_of(params)
    if mesh is None and jax.process_count() > 1:
        raise ValueError(
            f"{jax.process_count()} processes train on one mesh of all their devices: place the "
            "parameters on it (load with mesh=make_mesh())"
        )
    return mesh


def mesh_for(batch: int, *, accumulate: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh | None:
    """A mesh that a run suits: all devices, or as many as a lone process can use; None: one is.

    The batch is split over the devices that `fsdp` and `tensor` leave: all of them, or as many as
    it divides over where one process has them all.
    """
    for name, value in (("accumulate", accumulate), ("fsdp", fsdp), ("tensor", tensor)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    devices, split = jax.device_count(), fsdp * tensor
    rows = max(batch // accumulate // fsdp, 1)
    most = min(rows, max(devices // split, 1))
    data = next(size for size in range(most, 0, -1) if rows % size == 0)
    if jax.process_count() > 1:
        data = -1
    if data * split == 1:
        return None
    return make_mesh(data=data, fsdp=fsdp, tensor=tensor)


def gathered(tree: Params, mesh: Mesh | None) -> Params:
    """A small tree, whole on every device: one process can read it."""
    if mesh is None:
        return tree
    return jax.jit(lambda tree: tree, out_shardings=shardings((), mesh, Rules()))(tree)
