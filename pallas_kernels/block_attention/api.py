"""Block attention: a few queries against a long cache and against each other."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.block_attention import long, reference, tpu
from pallas_kernels.masks import BlockMask
from pallas_kernels.platform import is_tpu, note

_MOST_SCORES = 1 << 20  # of a query head, in one piece


def block_attention(
    q: Float[Array, "B Q N H"],
    k: Float[Array, "B Q K H"],
    v: Float[Array, "B Q K H"],
    mask: BlockMask,
    *,
    cache: Float[Array, "B K S H2"] | Float[Array, "Ly B K S H2"] | None = None,
    layer: Int[Array, ""] | None = None,
    cache_end: Int[Array, "B"] | Int[Array, "B Q"] | None = None,
    hole: tuple[Int[Array, "B"], Int[Array, "B"]] | None = None,
    lengths: Int[Array, "B"] | None = None,
    segments: Int[Array, "B Q"] | None = None,
    window: int = 0,
    scale: float | None = None,
    soft_cap: float = 0.0,
    implementation: str | None = None,
) -> Float[Array, "B Q N H"]:
    """Attention of Q entries over a cached prefix and over themselves under `mask`, grouped heads.

    Args:
      q, k, v: the entries' own queries, keys and values; `N` a multiple of `K`. Keys carry their
        rotary positions already.
      mask: how the entries see each other (`BlockMask`); entry order is clean first, then noisy
      groups.
      cache: keys and values of the prefix, packed side by side in the last axis (`H2 = 2 * H`); of
        all layers where `layer` says which. A loop over layers closes over the cache of all: sliced
        out beforehand, a layer is a copy.
      cache_end: valid slots of each row, or of each query; slots past it are neither read nor
      trusted.
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
      implementation: "tpu" (the kernel, for a cache), "xla", or None: the kernel on TPUs, where it
        takes the call, and XLA elsewhere.

    Returns:
      `[B, Q, N, H]` in the dtype of `q`; softmax in float32. A query that sees nothing gets zeros.

    Raises:
      ValueError: the entries do not fit the mask, `cache` comes without `cache_end`, the window or
        the scale is out of range, or the implementation asked for does not take the call.
    """
    return block_attention_lse(
        q, k, v, mask, cache=cache, layer=layer, cache_end=cache_end, hole=hole, lengths=lengths,
        segments=segments, window=window, scale=scale, soft_cap=soft_cap,
        implementation=implementation,
    )[0]  # fmt: skip


def block_attention_lse(
    q, k, v, mask: BlockMask, *, cache=None, layer=None, cache_end=None, hole=None, lengths=None,
    segments=None, window=0, scale=None, soft_cap=0.0, implementation=None,
) -> tuple[Float[Array, "B Q N H"], Float[Array, "B Q N"]]:  # fmt: skip
    """`block_attention`, and the natural logarithm of each query's sum of exponentials, float32.

    With it, results over other keys can be merged. A query that sees nothing has -inf.
    """
    entries = q.shape[1]
    noisy = entries - mask.clean
    if noisy < 0 or (noisy and (not mask.block or noisy % mask.block)):
        raise ValueError(
            f"{entries} entries do not fit {mask}: clean ones, then whole groups of `block`"
        )
    if (cache is None) != (cache_end is None):
        raise ValueError("`cache` and `cache_end` come together")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} kv heads")
    if window < 0 or (scale is not None and scale <= 0):
        raise ValueError(f"window={window} must be 0 (all) or positive, and scale={scale} positive")
    if implementation not in (None, "xla", "tpu"):
        raise ValueError(f"implementation={implementation!r} is none of None, 'xla', 'tpu'")
    if (layer is None) != (cache is None or cache.ndim == 4):
        raise ValueError("`layer` says which of a cache of several, [Ly, B, K, S, 2 * H], is meant")
    if segments is not None and cache is not None:
        raise ValueError("`segments` are of packed rows, which have no cache")
    static = _Static(mask, window, scale, soft_cap)
    arrays = _Arrays(q, k, v, cache, layer, cache_end, hole, lengths, segments)
    with jax.named_scope("block_attention"):
        return _on(implementation, static, arrays)(static, arrays)


class _Static(NamedTuple):
    mask: BlockMask
    window: int
    scale: float | None
    soft_cap: float


class _Arrays(NamedTuple):
    q: Any
    k: Any
    v: Any
    cache: Any
    layer: Any
    cache_end: Any
    hole: Any
    lengths: Any
    segments: Any


def _on(implementation: str | None, static: _Static, arrays: _Arrays) -> Callable[..., Any]:
    """The function that was asked for, or the one of the device that is compiled for."""
    if implementation == "xla" or (implementation is None and not is_tpu()):
        return _xla
    cache, _ = _stacked(arrays)
    reason = tpu.takes(arrays.q, arrays.k, static.mask, cache=cache, cache_end=arrays.cache_end)
    if implementation == "tpu":
        if reason:
            raise ValueError(f"the TPU kernel does not take this: {reason}")
        return _kernel
    if reason:
        note(f"block_attention runs in XLA, not in the TPU kernel: {reason}")
        return _xla
    return lambda static, arrays: jax.lax.platform_dependent(
        arrays, tpu=partial(_kernel, static), default=partial(_xla, static)
    )


def _stacked(arrays: _Arrays) -> tuple[Any, Any]:
    """The cache of all layers, and which of them is meant."""
    if arrays.layer is not None or arrays.cache is None:
        return arrays.cache, arrays.layer
    return arrays.cache[None], jnp.int32(0)


def _xla(static: _Static, arrays: _Arrays):
    """In one piece where its scores are few; else in tiles."""
    q, k, v, cache, layer, *_ = arrays
    keys = max(static.mask.clean, 0 if cache is None else cache.shape[-2])
    if q.shape[1] * keys > _MOST_SCORES:
        return long.block_attention(
            q, k, v, static.mask, **_named(static, arrays), cache=cache, layer=layer
        )
    if layer is not None:
        cache = jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False)
    return reference.block_attention(q, k, v, static.mask, **_named(static, arrays), cache=cache)


def _named(static: _Static, arrays: _Arrays) -> dict[str, Any]:
    """Arguments that all implementations have."""
    return {
        "cache_end": arrays.cache_end, "hole": arrays.hole, "lengths": arrays.lengths,
        "segments": arrays.segments, "window": static.window, "scale": static.scale,
        "soft_cap": static.soft_cap,
    }  # fmt: skip


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernel(static: _Static, arrays: _Arrays):
    """The kernel; its gradient is that of the definition."""
    cache, layer = _stacked(arrays)
    return tpu.block_attention(
        arrays.q, arrays.k, arrays.v, static.mask, cache=cache, layer=layer,
        cache_end=arrays.cache_end, hole=arrays.hole, lengths=arrays.lengths,
        window=static.window, scale=static.scale, soft_cap=static.soft_cap,
    )  # fmt: skip


def _forward(static: _Static, arrays: _Arrays):
    return _kernel(static, arrays), arrays


def _backward(static: _Static, arrays: _Arrays, grad):
    def run(q, k, v, cache):
        return _xla(static, arrays._replace(q=q, k=k, v=v, cache=cache))

    found = jax.vjp(run, *arrays[:4])[1](grad)
    q, k, v, cache = found
    return (arrays._replace(q=q, k=k, v=v, cache=cache, layer=None, cache_end=None, hole=None,
                            lengths=None, segments=None),)  # fmt: skip


_kernel.defvjp(_forward, _backward)
