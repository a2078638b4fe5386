"""Block attention: a few queries against a long cache and against each other."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int8

from pallas_kernels import platform
from pallas_kernels.block_attention import gpu, long, reference, tpu
from pallas_kernels.masks import BlockMask

# Scores of a query head: so many that XLA does them in tiles, and so few that a kernel is no use.
_MOST_SCORES, _FEW_SCORES = 1 << 20, 1 << 16
# A CPU takes so many queries at a time, or a quarter, so as not to compute what a mask hides.
_PIECE = 64


def block_attention(
    q: Float[Array, "B Q N H"],
    k: Float[Array, "B Q K H"],
    v: Float[Array, "B Q K H"],
    mask: BlockMask,
    *,
    cache: Float[Array, "*Ly B K S P"] | Int8[Array, "*Ly B K S P"] | None = None,
    layer: Int[Array, ""] | None = None,
    cache_end: Int[Array, "B"] | Int[Array, "B Q"] | None = None,
    cache_scale: Float32[Array, "*Ly B K 2"] | None = None,
    chosen: Bool[Array, "B M"] | None = None,
    hole: tuple[Int[Array, "B"], Int[Array, "B"]] | None = None,
    lengths: Int[Array, "B"] | None = None,
    segments: Int[Array, "B Q"] | None = None,
    window: int = 0,
    scale: float | None = None,
    soft_cap: float = 0.0,
    implementation: str | None = None,
) -> Float[Array, "B Q N H"]:
    """Attention of Q entries over a cached prefix and over themselves under `mask`, grouped heads.

    Inside of a `shard_map` it needs `check_vma=False`.

    Args:
      q, k, v: the entries' own queries, keys and values; `N` a multiple of `K`. Keys carry their
        rotary positions already.
      mask: how the entries see each other (`BlockMask`); entry order is clean first, then noisy
      groups.
      cache: keys and values of the prefix, [B, K, S, P]: keys are the first H of the last axis, and
        values the first H of its second half. `P = 2 * H`, or more to fill the 128 lanes of a TPU's
        registers: what lies between is finite. Of all layers, [Ly, B, K, S, P], where `layer` says
        which: a loop over layers closes over the cache of all; sliced out, a layer is a copy.
      cache_end: valid slots of each row, or of each query; slots past it are neither read nor
        trusted.
      cache_scale: of an int8 cache: what a unit of each row's and kv head's keys, and of its
        values, stands for; positive, even where nothing is stored yet. `[Ly, B, K, 2]` with
        `layer`.
      chosen: which of M equal pieces of the cache each row reads; the others are not read. All by
        default.
      hole: slots [first, second) of each row's cache that are not read, because the entries of this
        pass stand in for them (a canvas whose surroundings are cached approximately).
      lengths: valid clean entries of each row (right padding is not attended to). All by default.
      segments: the document that each entry is of (packed rows): an entry sees its own alone. Any
        numbers, each in one piece of the clean entries; without a cache.
      window: a query at position p sees only positions > p - window; 0: all. Slot s is position s;
        clean entry i follows the cache, at `cache_end + i`, or stands in the hole, at `first + i`.
        A noisy query counts from where its group begins, right behind the clean context that it
        sees, so that all of a group see the same `window - 1` last clean tokens, and the whole
        group.
      scale: of the scores, positive; 1 / sqrt(H) by default.
      soft_cap: scores x become soft_cap * tanh(x / soft_cap); 0: as they are.
      implementation: "tpu", "gpu" (the kernels: on GPUs, over a cache alone), "xla", or None: the
        kernel of the device, where there is one that takes the call, and XLA elsewhere.

    Returns:
      `[B, Q, N, H]` in the dtype of `q`; softmax in float32. A query that sees nothing gets zeros.

    Raises:
      ValueError: the entries do not fit the mask, the cache or what comes with it; the window or
        the scale is out of range; or the implementation asked for does not take the call.
    """
    return block_attention_lse(
        q, k, v, mask, cache=cache, layer=layer, cache_end=cache_end, cache_scale=cache_scale,
        chosen=chosen, hole=hole, lengths=lengths, segments=segments, window=window, scale=scale,
        soft_cap=soft_cap, implementation=implementation,
    )[0]  # fmt: skip


def block_attention_lse(
    q, k, v, mask: BlockMask, *, cache=None, layer=None, cache_end=None, cache_scale=None,
    chosen=None, hole=None, lengths=None, segments=None, own=True, window=0, scale=None,
    soft_cap=0.0, implementation=None,
) -> tuple[Float[Array, "B Q N H"], Float[Array, "B Q N"]]:  # fmt: skip
    """`block_attention`, and the natural logarithm of each query's sum of exponentials, float32.

    With it, results over other keys can be merged. A query that sees nothing has -inf.

    Args:
      own: whether the entries see each other; if not, this is attention over the cache alone, and
        `k` and `v` are not read.
    """
    entries = q.shape[1]
    noisy = entries - mask.clean
    if noisy < 0 or (noisy and (not mask.block or noisy % mask.block)):
        raise ValueError(
            f"{entries} entries do not fit {mask}: clean ones, then whole groups of `block`"
        )
    if (cache is None) != (cache_end is None):
        raise ValueError("`cache` and `cache_end` come together")
    if cache is not None:
        _check_cache(q.shape[3], cache, cache_scale, chosen)
    elif not own or any(x is not None for x in (cache_scale, chosen, hole)):
        raise ValueError(
            "own=False, `cache_scale`, `chosen` and `hole` are of a cache, and there is none"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} kv heads")
    if window < 0 or (scale is not None and scale <= 0):
        raise ValueError(f"window={window} must be 0 (all) or positive, and scale={scale} positive")
    if (layer is None) != (cache is None or cache.ndim == 4):
        raise ValueError("`layer` says which of a cache of several, [Ly, B, K, S, 2 * H], is meant")
    if segments is not None and cache is not None:
        raise ValueError("`segments` are of packed rows, which have no cache")
    static = _Static(mask, own, window, scale, soft_cap)
    arrays = _Arrays(q, k, v, cache, cache_scale, layer, cache_end, chosen, hole, lengths, segments)
    with jax.named_scope("block_attention"):
        return _on(implementation, static, arrays)


def _check_cache(size: int, cache, scale, chosen) -> None:
    slots, width = cache.shape[-2:]
    if width % 2 or width < 2 * size:
        raise ValueError(
            f"a cache of {width} lanes does not hold keys and values of {size}: {2 * size} or an "
            "even number above"
        )
    if (cache.dtype == jnp.int8) != (scale is not None):
        raise ValueError(f"a `cache_scale` is what an int8 cache has; this one is {cache.dtype}")
    if scale is not None and scale.shape != (*cache.shape[:-2], 2):
        raise ValueError(f"`cache_scale` is {scale.shape}, and must be {(*cache.shape[:-2], 2)}")
    if chosen is not None and (not chosen.shape[1] or slots % chosen.shape[1]):
        raise ValueError(f"{slots} slots are not {chosen.shape[1]} equal pieces to choose from")


class _Static(NamedTuple):
    mask: BlockMask
    own: bool
    window: int
    scale: float | None
    soft_cap: float


class _Arrays(NamedTuple):
    q: Any
    k: Any
    v: Any
    cache: Any
    cache_scale: Any
    layer: Any
    cache_end: Any
    chosen: Any
    hole: Any
    lengths: Any
    segments: Any


def _on(implementation: str | None, static: _Static, arrays: _Arrays):
    """What was asked for, or what the device that is compiled for has."""
    few = arrays.cache is None and arrays.q.shape[1] * static.mask.clean <= _FEW_SCORES
    if few and implementation is None:
        implementation = "xla"
    kernels = {"tpu": _of_tpu, "gpu": _of_gpu}
    choice = platform.choose(
        "block_attention", implementation, lambda name: kernels[name](static, arrays)[1]
    )
    functions = {"xla": partial(_xla, static)}
    if choice.name != "xla":
        functions[choice.name] = partial(kernels[choice.name](static, arrays)[0], static)
    return platform.run(choice, functions, arrays)


def _of_tpu(static: _Static, arrays: _Arrays) -> tuple[Callable[..., Any], str | None]:
    """The kernel for a call on a TPU, and why it does not take it, if so."""
    call = {
        "cache": _stacked(arrays).cache, "cache_end": arrays.cache_end, "chosen": arrays.chosen,
        "own": static.own,
    }  # fmt: skip
    q, k = arrays.q, arrays.k
    if arrays.cache is not None and (q.shape[1] <= tpu.MOST_ENTRIES or not static.own):
        return partial(_decode, tpu.block_attention), tpu.takes(q, k, static.mask, **call)
    return _long, long.takes(q, k, static.mask, **call)


def _of_gpu(static: _Static, arrays: _Arrays) -> tuple[Callable[..., Any], str | None]:
    """The same on a GPU."""
    reason = gpu.takes(
        arrays.q, arrays.k, static.mask, cache=_stacked(arrays).cache, cache_end=arrays.cache_end,
        chosen=arrays.chosen, own=static.own,
    )  # fmt: skip
    return partial(_decode, gpu.block_attention), reason


def _stacked(arrays: _Arrays) -> _Arrays:
    """With the cache of all layers, and which of them is meant."""
    if arrays.layer is not None or arrays.cache is None:
        return arrays
    cache, scale = jax.tree.map(lambda x: x[None], (arrays.cache, arrays.cache_scale))
    return arrays._replace(cache=cache, cache_scale=scale, layer=jnp.int32(0))


def _xla(static: _Static, arrays: _Arrays):
    """In one piece where its scores are few; else in tiles."""
    cache, layer = arrays.cache, arrays.layer
    keys = max(static.mask.clean, 0 if cache is None else cache.shape[-2])
    if arrays.q.shape[1] * keys > _MOST_SCORES:
        return long.block_attention(**arrays._asdict(), **static._asdict())
    if layer is not None:
        cache, scale = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False),
            (cache, arrays.cache_scale),
        )
        arrays = arrays._replace(cache=cache, cache_scale=scale)
    found = arrays._asdict()
    del found["layer"]
    causal = cache is None and static.mask.clean_block < static.mask.clean
    here = causal and platform.device_kind() == "cpu"
    piece = max(_PIECE, -(-static.mask.clean // 4)) if here else 0
    return reference.block_attention(**found, **static._asdict(), piece=piece)


def _long(static: _Static, arrays: _Arrays):
    return long.block_attention(**arrays._asdict(), **static._asdict(), kernels=True)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _decode(kernel: Callable[..., Any], static: _Static, arrays: _Arrays):
    """A kernel over a cache; its gradient is that of the definition."""
    found = _stacked(arrays)._asdict()
    del found["segments"]  # there are none where there is a cache
    return kernel(**found, **static._asdict())


def _forward(kernel, static: _Static, arrays: _Arrays):
    return _decode(kernel, static, arrays), arrays


def _backward(kernel, static: _Static, arrays: _Arrays, grad):
    floats = {
        name: x for name, x in arrays._asdict().items()
        if name in ("q", "k", "v", "cache", "cache_scale")
        and x is not None and jnp.issubdtype(x.dtype, jnp.floating)
    }  # fmt: skip

    found = jax.vjp(lambda x: _xla(static, arrays._replace(**x)), floats)[1](grad)[0]
    return (_Arrays(*[None] * len(arrays))._replace(**found),)


_decode.defvjp(_forward, _backward)
