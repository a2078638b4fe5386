"""How large a model is, and its part on one device of a mesh: parameters, cache, by its tree."""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from dllm_jax.sharding import AXES, shardings


class Parameters(NamedTuple):
    """Counts: all of them, and those that one token is multiplied by (of experts, the chosen)."""

    total: int
    active: int


class Attention(NamedTuple):
    """The attention of the layers of one kind, on one device."""

    layers: int
    heads: int
    kv_heads: int
    size: int  # of a head
    window: int  # 0: none


class Part(NamedTuple):
    """What a device has of a parameter."""

    path: tuple[str, ...]
    held: int  # elements that lie there
    used: int  # elements that it computes with, after those of `fsdp` have been gathered
    dims: int  # of one layer's array: 2 or more are a matrix
    layers: int  # that it is stacked of; 1: it is of none
    size: int  # bytes of an element

    @property
    def is_expert(self) -> bool:
        return "expert" in self.path


def parameters(config: Any) -> Parameters:
    """Of any architecture, exactly.

    What is looked up is not active: positions, and embeddings but where they are the output
    projection too.
    """
    total = active = 0
    share = _share_of_experts(config)
    tied = "head" not in config.tree()
    for part in parts(config, {}):
        total += part.held
        if part.path[0] != "positions" and (part.path[0] != "embed" or tied):
            active += round(part.held * (share if part.is_expert else 1))
    return Parameters(total, active)


def parts(config: Any, layout: Mapping[str, int]) -> list[Part]:
    """Every parameter, as one device of a layout has it."""
    return _parts(config, tuple(layout.get(axis, 1) for axis in AXES))


@functools.lru_cache(maxsize=64)  # a plan asks for one layout at many sizes
def _parts(config: Any, sizes: tuple[int, ...]) -> list[Part]:
    layout = dict(zip(AXES, sizes, strict=True))
    held, used = (_local(config, _mesh(layout, axes)) for axes in (AXES, ("expert", "tensor")))
    found = []
    for (keys, entry), own, computed in zip(_entries(config), held, used, strict=True):
        path = tuple(key.key for key in keys)
        if "expert" in entry.axes and len(entry.shape) > 3:
            path = (*path, "expert")
        stacked = "layers" in entry.axes
        size = jnp.dtype(entry.dtype or config.param_dtype).itemsize
        layers = entry.shape[0] if stacked else 1
        found.append(Part(path, own, computed, len(entry.shape) - stacked, layers, size))
    return found


def attentions(config: Any, layout: Mapping[str, int]) -> list[Attention]:
    """The attention of each kind of layer on one device; heads that do not divide are whole."""
    tensor = layout.get("tensor", 1)
    split = lambda heads: heads if heads % tensor else heads // tensor  # noqa: E731
    if not hasattr(config, "kinds"):
        heads, kv = split(config.num_heads), split(config.num_kv_heads)
        return [Attention(config.num_layers, heads, kv, config.head_dim, 0)]
    found = []
    for kind in config.kinds:
        kv, size = config.heads(kind)
        window = config.window if kind == "sliding" else 0
        found.append(
            Attention(len(config.numbers(kind)), split(config.num_heads), split(kv), size, window)
        )
    return found


def cache_bytes(
    config: Any, layout: Mapping[str, int], batch: int, slots: int, dtype: str | None = None
) -> int:
    """Of keys and values on one device; heads of 65 to 127 are padded, as `cache.allocate` does."""
    item = jnp.dtype(dtype or config.dtype).itemsize
    total = 0
    for own in attentions(config, layout):
        half = own.size if own.size < 64 else -(-own.size // 64) * 64
        scales = 8 if item == 1 else 0  # of keys and of values, in float32
        total += own.layers * own.kv_heads * (2 * half * slots * item + scales)
    return rows(layout, batch) * total


def rows(layout: Mapping[str, int], batch: int) -> int:
    """Rows of a batch on one device: the first axes that divide it split it."""
    for axis in ("data", "fsdp", "expert"):
        size = layout.get(axis, 1)
        if batch % size:
            break
        batch //= size
    return batch


def touched(config: Any, entries: int) -> float:
    """The share of a layer's experts that so many tokens choose, each as likely as another."""
    share = _share_of_experts(config)
    return 1 - (1 - share) ** entries


def _share_of_experts(config: Any) -> float:
    routed = getattr(config, "moe", None) or config
    experts = getattr(routed, "num_experts", 0)
    return routed.experts_per_token / experts if experts else 1.0


def _entries(config: Any) -> list[Any]:
    return jax.tree.leaves_with_path(config.tree(), is_leaf=lambda x: hasattr(x, "axes"))


def _mesh(layout: Mapping[str, int], axes: tuple[str, ...]) -> AbstractMesh:
    return AbstractMesh(tuple(layout.get(a, 1) if a in axes else 1 for a in AXES), AXES)


def _local(config: Any, mesh: AbstractMesh) -> list[int]:
    entries = [entry for _, entry in _entries(config)]
    shapes = [jax.ShapeDtypeStruct(e.shape, jnp.int8) for e in entries]
    places = shardings([e.axes for e in entries], mesh, shapes=shapes)
    return [math.prod(p.shard_shape(s.shape)) for p, s in zip(places, shapes, strict=True)]
