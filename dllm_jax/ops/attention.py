"""Block attention where its arrays lie on a mesh: by rows, by heads, and by pieces of long texts.

The compiler cannot split a kernel, nor much of what XLA has in its place, so each device runs
`block_attention` on its own part (`sharding.mapped`): rows of the batch, and whole kv heads with
the query heads that read them. Nothing travels for that.

Over a mesh axis "context" a long pass is cut along its length too. Each device has the queries of
its piece, and gathers the keys and values of one layer; what a query sees of them has an end, as a
cache has. No scores of all entries exist anywhere.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int8

from dllm_jax.sharding import axis_sizes, mapped, spec, split
from pallas_kernels import BlockMask, block_attention, block_attention_lse
from pallas_kernels.block_attention.products import merged

_CONTEXT, _TENSOR = "context", "tensor"


def attention(
    q: Float[Array, "B Q N H"],
    k: Float[Array, "B Q K H"],
    v: Float[Array, "B Q K H"],
    mask: BlockMask,
    *,
    cache: Float[Array, "*Ly B K S P"] | Int8[Array, "*Ly B K S P"] | None = None,
    layer: Int[Array, ""] | None = None,
    cache_end: Int[Array, "B"] | Int[Array, "B Q"] | None = None,
    cache_scale: Float32[Array, "*Ly B K 2"] | None = None,
    hole: tuple[Int[Array, "B"], Int[Array, "B"]] | None = None,
    lengths: Int[Array, "B"] | None = None,
    segments: Int[Array, "B Q"] | None = None,
    **numbers: Any,
) -> Float[Array, "B Q N H"]:
    """`pallas_kernels.block_attention`, split over the mesh in scope; without one, exactly that.

    Where the axis "tensor" does not divide the kv heads, they are whole on each device; if they
    divide it, a device picks the one that its query heads read, else query heads are whole as well.
    Rows of several documents are not cut along their length.

    Args:
      numbers: `window`, `scale` and `soft_cap` of `block_attention`; the others are as there.
    """
    arrays: dict[str, Any] = {
        "q": q, "k": k, "v": v, "cache": cache, "layer": layer, "cache_end": cache_end,
        "cache_scale": cache_scale, "hole": hole, "lengths": lengths, "segments": segments,
    }  # fmt: skip
    arrays = {name: x for name, x in arrays.items() if x is not None}
    if not axis_sizes():
        return block_attention(mask=mask, **arrays, **numbers)
    place = _place(q, k)
    cuts = _cuts(mask, q.shape[1], cache is not None, numbers)
    if any(cuts.values()) and segments is None:
        return _in_pieces(mask, cuts, place, arrays, numbers)

    def run(arrays):
        return block_attention(mask=mask, **place.own(arrays), **numbers)

    specs = place.specs(arrays)
    return mapped(run, (specs,), specs["q"])(arrays)


class _Place(NamedTuple):
    """The mesh axes over which arrays are split, and how a device comes to its own kv heads."""

    rows: tuple[str, ...]
    heads: tuple[str, ...]
    kv_heads: tuple[str, ...]
    sharing: int  # devices that read the same kv head, each its copy of it; 0: kv heads as they lie

    def specs(self, arrays: dict[str, Any], length: tuple[str, ...] = ()) -> dict[str, Any]:
        """The specification of each argument; `length`: that of entries."""
        kv = spec(self.rows, length, self.kv_heads)
        layers = (None,) if "layer" in arrays else ()
        packed = spec(*layers, self.rows, self.kv_heads)
        ends = (spec(self.rows),) * 2
        known = {
            "q": spec(self.rows, length, self.heads), "k": kv, "v": kv, "cache": packed,
            "cache_scale": packed, "layer": spec(), "cache_end": spec(self.rows), "hole": ends,
            "lengths": ends[0], "segments": spec(self.rows, length),
        }  # fmt: skip
        if "cache_end" in arrays and arrays["cache_end"].ndim == 2:
            known["cache_end"] = spec(self.rows, length)
        return {name: known[name] for name in arrays}

    def own(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """A device's arguments, with the kv heads that it reads."""
        if not self.sharing:
            return arrays
        head = jax.lax.axis_index(_TENSOR) // self.sharing
        found = _of_layer(arrays)
        for name, axis in {"k": 2, "v": 2, "cache": 1, "cache_scale": 1}.items():
            if name in found:
                found[name] = jax.lax.dynamic_slice_in_dim(found[name], head, 1, axis)
        return found


def _place(q, k) -> _Place:
    heads, kv_heads, parts = q.shape[2], k.shape[2], axis_sizes().get(_TENSOR, 1)
    rows, along = split("batch", len(q)), split("kv_heads", kv_heads)
    if not along and parts % kv_heads == 0 and heads % parts == 0 and parts > 1:
        return _Place(rows, (_TENSOR,), (), parts // kv_heads)
    return _Place(rows, along, along, 0)


def _of_layer(arrays: dict[str, Any]) -> dict[str, Any]:
    """The arguments with the cache of the layer alone."""
    found = dict(arrays)
    if "layer" in found:
        layer = found.pop("layer")
        for name in found.keys() & {"cache", "cache_scale"}:
            found[name] = jax.lax.dynamic_index_in_dim(found[name], layer, keepdims=False)
    return found


# Pieces of long texts


def _cuts(mask: BlockMask, entries: int, cached: bool, numbers: dict[str, Any]) -> dict[str, bool]:
    """Whether clean entries, and noisy ones, are cut over the context axis.

    A window is cut where the text is causal and has no cache, and else not.
    """
    noisy = entries - mask.clean
    whole = numbers.get("window") and (cached or mask.clean_block > 1)
    groups = noisy // mask.block if noisy else 0
    even = groups % axis_sizes().get(_CONTEXT, 1) == 0
    return {
        "clean": not whole and bool(split("length", mask.clean)),
        "noisy": not whole and bool(split("length", noisy)) and even,
    }


def _in_pieces(mask: BlockMask, cuts, place: _Place, arrays, numbers) -> jax.Array:
    """Attention of a pass whose clean entries, or noisy ones, are cut, each by themselves.

    A cache with an end for each query is a text in such pieces itself, as in training; a decoder's,
    with an end for each row, is on each device as a whole.
    """
    q, end = arrays["q"], arrays.get("cache_end")
    streams, specs = {}, {}
    for kind, at in ("clean", slice(0, mask.clean)), ("noisy", slice(mask.clean, q.shape[1])):
        if at.start == at.stop:
            continue
        own = {name: arrays[name][:, at] for name in "qkv"}
        if end is not None:
            own["cache_end"] = jnp.broadcast_to(end.reshape(len(q), -1), q.shape[:2])[:, at]
        streams[kind] = own
        specs[kind] = place.specs(own, (_CONTEXT,) if cuts[kind] else ())
    common = {name: x for name, x in arrays.items() if name not in ("q", "k", "v", "cache_end")}
    common_specs = place.specs(common)
    gathers = end is not None and end.ndim == 2 and bool(split("length", common["cache"].shape[-2]))
    if gathers:
        common_specs["cache"] = spec(*common_specs["cache"], _CONTEXT)

    def run(streams, common):
        common = place.own(common)
        if gathers:
            common = _of_layer(common)
            common["cache"] = _all(common["cache"], 2)
        return _piece(
            mask, cuts, {kind: place.own(x) for kind, x in streams.items()}, common, numbers
        )

    out_specs = {kind: each["q"] for kind, each in specs.items()}
    out = mapped(run, (specs, common_specs), out_specs)(streams, common)
    return jnp.concatenate([out[kind] for kind in streams], axis=1)


def _piece(mask: BlockMask, cuts, streams, common, numbers) -> dict[str, jax.Array]:
    """What a device makes of its piece of each stream: parts over several sets of keys, merged."""
    cached = dict(common)
    lengths, window = cached.pop("lengths", None), numbers.get("window", 0)
    text = None
    if "clean" in streams:
        text = jnp.concatenate([streams["clean"]["k"], streams["clean"]["v"]], axis=-1)
        text = jnp.moveaxis(_all(text, 1) if cuts["clean"] else text, 1, 2)
    found = {}
    for kind, own in streams.items():
        q, clean = own["q"], kind == "clean"
        index = jnp.arange(q.shape[1]) + (0 if clean else mask.clean)
        if cuts[kind]:
            index = index + jax.lax.axis_index(_CONTEXT) * q.shape[1]
        parts = []
        if text is not None:
            end = mask.clean_end(index)[None]
            end = end if lengths is None else jnp.minimum(end, lengths[:, None])
            # A window is behind a query; the end of what a clean one sees is behind itself.
            behind = {"window": window + clean if window else 0}
            end = jnp.broadcast_to(end, q.shape[:2])
            parts.append(_over(q, cache=text, cache_end=end, **{**numbers, **behind}))
        rest = {**cached, "cache_end": own["cache_end"]} if cached else {}
        if not clean:
            groups = BlockMask.block_diagonal(mask.block)
            parts.append(block_attention_lse(q, own["k"], own["v"], groups, **rest, **numbers))
        elif rest:
            parts.append(_over(q, **rest, **numbers))
        found[kind] = merged(parts)[0].astype(q.dtype)
    return found


def _over(q, *, cache, **options) -> tuple[jax.Array, jax.Array]:
    """Attention over a cache alone, and its log-sums."""
    none = q[:, :, : cache.shape[-3]]  # keys and values of the entries, which are not read
    groups = BlockMask.block_diagonal(q.shape[1])
    return block_attention_lse(q, none, none, groups, cache=cache, own=False, **options)


def _all(x: jax.Array, axis: int) -> jax.Array:
    """The pieces of all devices, in order."""
    return jax.lax.all_gather(x, _CONTEXT, axis=axis, tiled=True)
